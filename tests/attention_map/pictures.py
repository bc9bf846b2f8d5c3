"""Draw the pictures of the help pages of Select Words, Attention Map, Find Words and Read Attention Map.

python dev.py draw attention_map
"""

from __future__ import annotations

from make_pictures import GUIDANCE, LETTERS, ROOT, STEPS, Studio, example_scene, panels, save
from PIL import Image, ImageDraw, ImageFont
from pocket import world

PROMPT = "a red cat standing on the right in the snow"
CHOICES = (
    ("A red cat, in the snow", "cat"),
    ("A red cat, in the snow", "red *"),
    ("A red cat, in the snow", "*"),
    ("a cat and a (brown:1.2) cat asleep", "cat#2"),
    ("an axolotl painting", "axolotl, paint*"),
)


def to_image(picture) -> Image.Image:
    """A picture (H, W, 3) or a mask (H, W) in 0..1."""
    return Image.fromarray((picture * 255).round().byte().numpy()).convert("RGB")


def tokens_sheet(clip, words) -> Image.Image:
    """Prompts as boxes, one for each piece, the chosen ones filled; what was asked for stands over each."""
    font, height = ImageFont.load_default(LETTERS), 90
    sheet = Image.new("RGB", (520, height * len(CHOICES)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (prompt, asked) in enumerate(CHOICES):
        chosen = words.select(clip, prompt, asked)[0].every_position
        top, left = 38 + height * line, 6
        draw.text((left, top - 18), f"words: {asked}", fill=(30, 30, 30), font=font, anchor="lm")
        for word in words.read_words(clip, prompt)["l"]:
            for piece, place in zip(word.pieces, word.positions, strict=True):
                text = words.decoded([piece])
                width = draw.textlength(text, font=font) + 10
                filled = place in chosen
                draw.rectangle(
                    (left, top, left + width, top + 36), fill=(224, 90, 40) if filled else (238, 238, 238),
                    outline=(190, 190, 190),
                )  # fmt: skip
                draw.text((left + 5, top + 18), text, fill="white" if filled else (60, 60, 60), font=font, anchor="lm")
                left += width + 2
            left += 6
    return sheet


def main() -> None:
    """Write web/docs/Palimpsest{SelectWords,AttentionMap,FindWords,ReadAttentionMap}/*.jpg."""
    studio, scene = Studio(), example_scene()
    from palimpsest.nodes import words
    from palimpsest.nodes.attention_map import nodes as attention_map
    from palimpsest.nodes.words.nodes import SelectWords

    def run(node, **inputs):
        return node.execute(**studio.defaults(node) | inputs).args

    with studio.torch.inference_mode():
        tokens, positive, _ = run(SelectWords, clip=studio.clip, text=PROMPT, words="red cat, cat, red, snow")
        trajectory, noise = studio.invert(scene)
        model, record = run(attention_map.AttentionMap, model=studio.model, tokens=tokens)
        (samples,) = studio.host.KSamplerAdvanced().sample(
            model,
            "disable",
            0,
            STEPS,
            GUIDANCE,
            "euler",
            "normal",
            positive,
            studio.nothing,
            noise,
            0,
            10000,
            "disable",
        )
        drawn = studio.vae.decode(samples["samples"]).clamp(0, 1)
        source = studio.torch.from_numpy(world.render(scene)).float()[None] / 255
        (found,) = run(
            attention_map.FindWords, model=studio.model, trajectory=trajectory, tokens=tokens, positive=positive
        )

        def read(record, image, **settings):
            """(heat map, mask, soft map) of one word."""
            samples_of = {"samples": samples} if record.needs_samples else {}
            inputs = {"record": record, "image": image, "label": False} | samples_of | settings
            return [to_image(picture[0]) for picture in run(attention_map.ReadAttentionMap, **inputs)[:3]]

        sheets = {
            "PalimpsestSelectWords/words": tokens_sheet(studio.clip, words),
            "PalimpsestAttentionMap/maps": panels(
                [(to_image(drawn[0]), "as it is sampled")]
                + [(read(record, drawn, words=word)[0], word) for word in ("red", "cat", "snow")]
            ),
            "PalimpsestFindWords/found": panels(
                [(to_image(source[0]), "your picture")]
                + [(read(found, source, words="red cat")[i], text) for i, text in ((0, "red cat"), (1, "its mask"))]
                + [(read(found, source, words="snow")[0], "snow")]
            ),
            "PalimpsestReadAttentionMap/reading": panels(
                [
                    (picture, text)
                    for picture, text in zip(
                        read(record, drawn, words="red cat"), ("heat_map: red cat", "mask", "soft_map"), strict=True
                    )
                ]
            ),
            "PalimpsestReadAttentionMap/settings": panels(
                [
                    (read(record, drawn, words="red cat", start_percent=0.0, end_percent=0.2)[0], "start 0, end 0.2"),
                    (read(record, drawn, words="red cat")[0], "start 0.5, end 1"),
                    (read(record, drawn, words="red cat", levels="1/1 of the latent")[0], "1/1 of the latent"),
                    (read(record, drawn, words="red cat", levels="1/2 of the latent")[0], "1/2 of the latent"),
                ]
            ),
        }
    for name, sheet in sheets.items():
        print(save(sheet, ROOT / "web" / "docs" / f"{name}.jpg").relative_to(ROOT))
