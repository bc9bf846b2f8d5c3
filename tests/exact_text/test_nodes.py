"""Text Lines, Text Prompt and Read Text in the host: places, letters, tokens, readings, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import comfy.sd
import folder_paths
import pytest
import tiny_models
import torch
from comfy import sd1_clip, sdxl_clip
from comfy.text_encoders import sd2_clip
from palimpsest.nodes.exact_text import TextEmbedder, TextLines, fonts, places, shipped_recogniser
from palimpsest.nodes.exact_text.nodes import ReadText, TextLinesNode, TextPrompt

HERE = Path(__file__).resolve().parent
SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SD1 = (sd1_clip.SD1ClipModel, sd1_clip.SD1Tokenizer)
SDXL = (sdxl_clip.SDXLClipModel, sdxl_clip.SDXLTokenizer)
SD2 = (sd2_clip.SD2ClipModel, sd2_clip.SD2Tokenizer)
SIGNS = HERE.parent / "pocket" / "fonts"
CHINESE = "\u5c71\u6c34"

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(autouse=True)
def font_folder(tmp_path, monkeypatch):
    """A folder of fonts with the two of the pocket's signs, and no font of this machine."""
    for file in SIGNS.glob("*.ttf"):
        shutil.copy(file, tmp_path)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, fonts.FOLDER, ([str(tmp_path)], set(fonts.KINDS)))
    monkeypatch.delitem(folder_paths.filename_list_cache, fonts.FOLDER, raising=False)
    return tmp_path


def lines(text="EXACT TEXT", **chosen):
    """Text Lines' outputs: text_lines, glyphs, positions, preview, report."""
    return tiny_models.execute(TextLinesNode, lines=text, **chosen)


def mask(*boxes, size=(256, 256)):
    """A MASK with white boxes (left, top, right, bottom)."""
    found = torch.zeros(1, *size)
    for left, top, right, bottom in boxes:
        found[:, top:bottom, left:right] = 1
    return found


def box(x, y, width, height):
    return {"x": x, "y": y, "width": width, "height": height}


def slanted(angle, size=256, length=220, breadth=44):
    """A MASK with a white bar through its middle, turned counterclockwise by an angle in degrees."""
    y, x = torch.meshgrid(torch.arange(size) + 0.5 - size / 2, torch.arange(size) + 0.5 - size / 2, indexing="ij")
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return (((x * c - y * s).abs() < length / 2) & ((x * s + y * c).abs() < breadth / 2)).float()[None]


def read(image, **chosen):
    """Read Text's outputs by name."""
    names = ("text", "report", "exact", "ned", "confidence", "numbers", "picture")
    return dict(zip(names, tiny_models.execute(ReadText, image=image, **chosen), strict=True))


def centre_of(picture):
    """Where the white of (H, W) lies: x and y."""
    rows, columns = picture.nonzero().float().mean(0).tolist()
    return columns + 0.5, rows + 0.5


# ---------------------------------------------------------------------------------------------------------- Text Lines


def test_what_comes_out_has_the_shapes_that_others_build_on():
    made, glyphs, positions, preview, report = lines("One\n\nTwo  lines ", width=320, height=256)
    assert isinstance(made, TextLines)
    made.require_sound()
    assert [line.text for line in made.lines] == ["One", "Two lines"]
    assert (made.glyphs.shape, made.positions.shape, made.strips.shape) == ((1, 512, 640), (1, 256, 320), (2, 80, 512))
    assert made.size == (256, 320)
    assert (glyphs.shape, positions.shape, preview.shape) == ((1, 512, 640, 3), (1, 256, 320), (1, 256, 320, 3))
    for tensor in (made.glyphs, made.positions, made.strips):
        assert tensor.dtype == torch.float32
        assert set(tensor.unique().tolist()) == {0.0, 1.0}
    outside = torch.nn.functional.max_pool2d(made.glyphs, 2)[0] > made.positions[0]
    assert not outside.any(), "letters lie in their places"
    assert "'One' around" in report


def test_the_picture_is_left_alone_and_gives_the_size():
    picture = tiny_models.picture(2, 128, 192)
    before = picture.clone()
    made, _, positions, preview, _ = lines("HI", image=picture, width=512, height=512)
    assert torch.equal(picture, before)
    assert made.size == (128, 192)
    assert preview.shape == picture.shape
    far = positions[0] == 0
    far[:30], far[-30:] = False, False
    assert float((preview - picture)[:, :8].abs().max()) < 0.01, "nothing is drawn far from the lines"


def test_a_part_of_the_mask_is_a_place_and_the_order_goes_by_reading():
    """Three parts: above on the right, above on the left but a little lower, below."""
    where = mask((140, 10, 240, 50), (10, 20, 120, 60), (30, 150, 220, 200))
    made = lines("AAA\nBBB\nCCC", mask=where, width=256, height=256)[0]
    assert [centre(line) for line in made.lines] == [(65, 40), (190, 30), (125, 175)]
    made = lines("AAA\nBBB\nCCC", mask=where, order=places.RIGHT, width=256, height=256)[0]
    assert [centre(line) for line in made.lines] == [(65, 40), (125, 175), (190, 30)]


def centre(line):
    low, high = line.polygon.amin(0), line.polygon.amax(0)
    return tuple(((low + high) / 2).tolist())


def test_boxes_as_given_are_taken_one_by_one():
    boxes = [[box(20, 150, 100, 40), box(20, 20, 200, 40)]]
    made = lines("AAA\nBBB", bboxes=boxes, order=places.AS_GIVEN, width=256, height=256)[0]
    assert [centre(line) for line in made.lines] == [(70, 170), (120, 40)]
    made = lines("AAA\nBBB", bboxes=boxes, width=256, height=256)[0]
    assert [centre(line) for line in made.lines] == [(120, 40), (70, 170)]


def test_a_box_and_its_mask_are_the_same_place():
    by_box = lines("SIGN", bboxes=box(30, 40, 150, 60), width=256, height=256)[0]
    by_mask = lines("SIGN", mask=mask((30, 40, 180, 100)), width=256, height=256)[0]
    for name in ("glyphs", "positions", "strips"):
        assert torch.equal(getattr(by_box, name), getattr(by_mask, name)), name


def test_several_masks_are_a_place_each():
    both = torch.cat([mask((10, 150, 100, 190), (150, 150, 240, 190)), mask((10, 20, 240, 60))])
    made = lines("AAA\nBBB", mask=both, width=256, height=256, order=places.AS_GIVEN)[0]
    assert [centre(line) for line in made.lines] == [(125, 170), (125, 40)]


@pytest.mark.parametrize("angle", [0, 30, -40, 60])
def test_a_slanted_place_has_slanted_letters_that_read_level(angle):
    made, _, _, preview, _ = lines("Palimpsest", mask=slanted(angle), width=256, height=256)
    assert not made.lines[0].vertical
    x, y = centre_of(made.glyphs[0])
    assert (x, y) == pytest.approx((256, 256), abs=14)
    assert read(preview, text_lines=made)["text"] == "Palimpsest"


def test_an_upright_place_is_written_downwards():
    where = mask((100, 10, 150, 246))
    made = lines("DOWN", mask=where, width=256, height=256)[0]
    assert made.lines[0].vertical
    rows = made.glyphs[0].any(1)
    runs = int((rows[1:] & ~rows[:-1]).sum())
    assert runs == 4, "a letter below a letter"
    level = lines("DOWN", mask=where, direction=places.LEVEL, width=256, height=256)[0]
    assert not level.lines[0].vertical
    down = lines("DOWN", mask=mask((10, 10, 246, 246)), direction=places.DOWNWARDS, width=256, height=256)[0]
    assert down.lines[0].vertical


def test_size_and_spacing_and_what_is_too_long():
    where = {"bboxes": box(8, 100, 240, 40), "width": 256, "height": 256}

    def extent(**chosen):
        glyphs = lines("ABC", **where | chosen)[0].glyphs[0]
        columns, rows = glyphs.any(0).nonzero(), glyphs.any(1).nonzero()
        return int(columns[-1] - columns[0]), int(rows[-1] - rows[0])

    wide, high = extent()
    tight, same = extent(spacing=0.0)
    assert high == same
    assert wide == pytest.approx(0.8 * 480, abs=12), "spread over AnyText's share of the place"
    assert tight < wide / 2
    assert extent(size=0.4)[1] == pytest.approx(high / 2, abs=2)
    long = lines("a line that is far too long for it", **where)[0].glyphs[0].any(0).nonzero()
    assert int(long[-1] - long[0]) <= 0.86 * 480


def test_what_is_unusual_is_said():
    report = lines("\n".join(f"line {n} of many letters" for n in range(6)), width=516, height=512)[4]
    assert "6 lines are more than the 5 of AnyText's training" in report
    assert "line 1, 2, 3, 4, 5, 6 has more than the 20 letters" in report
    assert "516 x 512 is no multiple of 8" in report
    boxes = [box(10, 10, 100, 40), box(80, 20, 100, 40)]
    assert "the places of lines 1 and 2 overlap" in lines("A\nB", bboxes=boxes, width=256, height=256)[4]


def test_chinese_by_a_font_that_has_it():
    made = lines(CHINESE, font="wqy_micro_hei.ttf", bboxes=box(40, 90, 170, 70), width=256, height=256)
    assert read(made[3], text_lines=made[0])["exact"] == 1.0


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ({"text": CHINESE}, r"no letter '\S' \(U\+5C71\), '\S' \(U\+6C34\) of the line"),
        ({"text": "ABC1", "font": "dejavu_sans_bold.ttf"}, r"dejavu_sans_bold.ttf has no letter '1' \(U\+0031\)"),
        ({"text": " \n "}, "lines holds 0 lines of text"),
        ({"text": "\n".join("A" * 65)}, "lines holds 65 lines of text"),
        ({"text": "A" * 201}, "has 201 letters"),
        ({"text": "A\u200bB"}, "holds signs that cannot be drawn"),
        ({"text": "A\nB", "mask": mask((10, 10, 100, 50))}, "2 lines of text and 1 white parts of the mask"),
        ({"text": "A", "bboxes": [box(0, 0, 90, 30), box(0, 90, 90, 30)]}, "1 lines of text and 2 boxes"),
        ({"mask": mask()}, "the mask has no white"),
        ({"mask": mask((10, 10, 13, 13))}, "1 separate white parts, 0 of them larger than 4 pixels"),
        ({"mask": mask((10, 10, 200, 16))}, "190 x 6 pixels .* is too narrow"),
        ({"bboxes": box(300, 10, 50, 50)}, r"box 1 \(300, 10, 50 x 50\) lies outside"),
        ({"bboxes": []}, "bboxes holds 0 boxes"),
        ({"bboxes": box(0, 0, 90, 30), "mask": mask((10, 10, 100, 50))}, "disconnect one of them"),
        ({"font": "../../etc/passwd"}, "there is no font"),
    ],
)
def test_what_cannot_be_written_ends_in_a_sentence(chosen, why):
    chosen = {"text": "A", "width": 256, "height": 256} | chosen
    with pytest.raises(ValueError, match=why):
        lines(**chosen)


def test_scripts_that_join_letters_are_refused_without_raqm(font_folder, monkeypatch):
    monkeypatch.setattr(fonts.features, "check", lambda name: False)
    monkeypatch.setattr(fonts.Font, "missing", lambda self, text: [])
    with pytest.raises(ValueError, match="whose script joins letters or runs from the right"):
        lines("\u05e9\u05dc")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AB c", ["A", "B", " ", "c"]),
        ("x\u0304y", ["x\u0304", "y"]),
        ("\u0633\u0644\u0627\u0645", ["\u0633\u0644\u0627\u0645"]),
        ("\u0915\u094d\u0937", ["\u0915\u094d\u0937"]),
    ],
)
def test_letters_that_join_are_one_piece(text, expected):
    assert fonts.pieces(text) == expected


def test_a_line_of_joined_letters_is_not_spread(monkeypatch):
    chosen = {"text": "ABC", "width": 256, "height": 256, "bboxes": box(8, 100, 240, 40)}
    close, spread = lines(**chosen, spacing=0.0)[0], lines(**chosen)[0]
    assert not torch.equal(close.glyphs, spread.glyphs)
    monkeypatch.setattr(fonts, "is_from_the_right", lambda letter: True)
    assert torch.equal(lines(**chosen)[0].glyphs, close.glyphs)


def test_only_fonts_are_listed_and_read(font_folder):
    (font_folder / "notes.txt").write_text("no font")
    (font_folder / "broken.ttf").write_bytes(b"no font")
    folder_paths.filename_list_cache.pop(fonts.FOLDER, None)
    assert fonts.listed() == [fonts.BUILT_IN, "broken.ttf", "dejavu_sans_bold.ttf", "wqy_micro_hei.ttf"]
    with pytest.raises(ValueError, match=r"broken.ttf cannot be read as a font"):
        lines(font="broken.ttf")


def test_the_systems_fonts_come_behind_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setitem(fonts.FONT_FOLDERS, fonts.sys.platform, (str(tmp_path), str(tmp_path / "gone")))
    monkeypatch.delitem(folder_paths.folder_names_and_paths, fonts.FOLDER)
    for _ in range(2):
        fonts.FontFolders().register()
    paths, kinds = folder_paths.folder_names_and_paths[fonts.FOLDER]
    assert paths == [str(tmp_path / "models" / fonts.FOLDER), str(tmp_path)]
    assert set(kinds) == set(fonts.KINDS)


# --------------------------------------------------------------------------------------------------------- Text Prompt


def clip(family=SD1):
    """The host's CLIP of a family with small random text models."""

    class Target:
        clip, tokenizer = family
        params = {}  # noqa: RUF012

    torch.manual_seed(0)
    options = {f"clip_{name}_model_config": SMALL for name in "lgh"} | {"dtype": torch.float32}
    made = comfy.sd.CLIP(Target(), model_options=options)
    tiny_models.fill(made.cond_stage_model)
    return made


def embedder(width=24):
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(width, 2560, generator=generator) / 50, torch.zeros(width)
    return TextEmbedder(
        shipped_recogniser(),
        {"weight": weight, "bias": bias, "norm_weight": torch.ones(width), "norm_bias": torch.zeros(width)},
    )


def prompted(text, drawn, model=None, made=None):
    """Text Prompt's outputs: positive, prompt, report."""
    return tiny_models.execute(
        TextPrompt, clip=model or clip(), text=text, text_lines=drawn, text_embedder=made or embedder()
    )


def overwritten(model, tokens, rows):
    """What a CLIP gives whose table holds other embeddings: {token: embedding}."""
    table = model.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    before = table.clone()
    for token, row in rows.items():
        table[token] = row
    try:
        return model.encode_from_tokens_scheduled(tokens)[0][0]
    finally:
        table.copy_(before)


STAR, OTHER = 265, 1000  # the placeholder, and any token that no prompt here has


@pytest.mark.parametrize(
    ("text", "plain", "weight"),
    [
        ('a sign that says "OPEN"', "a sign that says  * ", 1.0),
        ('a sign ("OPEN":1.3), red', "a sign ( * :1.3), red", 1.3),
        ("a \u201cOPEN\u201d, a sign", "a  * , a sign", 1.0),
        ("a, " * 45 + '"OPEN" at night', "a, " * 45 + " *  at night", 1.0),
    ],
    ids=["plain", "weighted", "curly quotes", "long"],
)
def test_a_line_is_what_its_embedding_in_the_table_would_be(text, plain, weight):
    model, drawn, made = clip(), lines("OPEN")[0], embedder()
    positive, prompt, report = prompted(text, drawn, model, made)
    assert prompt.split() == plain.split()
    tokens = model.tokenize(plain)
    assert [w for row in tokens["l"] for token, w in row if token == STAR] == [weight]
    expected = overwritten(model, tokens, {STAR: made.embed(drawn.strips)[0]})
    assert torch.equal(positive[0][0], expected)
    assert not torch.equal(positive[0][0], model.encode_from_tokens_scheduled(tokens)[0][0])
    assert ("weight 1.3" in report) == (weight == 1.3)


def test_each_line_has_its_own_embedding_in_whatever_order_the_prompt_names_them():
    model, made = clip(), embedder()
    drawn = lines("OPEN\nCLOSED")[0]
    first, second = made.embed(drawn.strips)
    tokens = model.tokenize("a  *  and a  * ")
    places = [i for i, (token, _) in enumerate(tokens["l"][0]) if token == STAR]
    tokens["l"][0][places[1]] = (OTHER, 1.0)
    positive = prompted('a "OPEN" and a "CLOSED"', drawn, model, made)[0]
    assert torch.equal(positive[0][0], overwritten(model, tokens, {STAR: first, OTHER: second}))
    positive = prompted('a "CLOSED" and a "OPEN"', drawn, model, made)[0]
    assert torch.equal(positive[0][0], overwritten(model, tokens, {STAR: second, OTHER: first}))


def test_the_clip_is_as_it_was_and_nothing_is_left_behind():
    model, drawn = clip(), lines("OPEN")[0]
    before = {name: tensor.clone() for name, tensor in model.cond_stage_model.state_dict().items()}
    found = [prompted('a "OPEN"', drawn, model)[0][0][0] for _ in range(2)]
    assert torch.equal(*found)
    after = model.cond_stage_model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_second_encoder_of_sdxl_keeps_the_placeholder_and_it_is_said():
    model, drawn = clip(SDXL), lines("OPEN")[0]
    positive, _, report = prompted('a "OPEN"', drawn, model)
    plain = model.encode_from_tokens_scheduled(model.tokenize("a  * "))[0][0]
    assert not torch.equal(positive[0][0][..., :24], plain[..., :24])
    assert torch.equal(positive[0][0][..., 24:], plain[..., 24:])
    assert "the text encoder g reads a plain *" in report


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a sign", "the prompt lacks 'OPEN'"),
        ('a "open"', "the prompt lacks 'OPEN' and has, and Text Lines does not draw, 'open'"),
        ('a "OPEN" and "OPEN"', "has, and Text Lines does not draw, 'OPEN'"),
        ('a "OPEN', "has 1 double quotes, one of them opens a line"),
        ('5* and "OPEN"', r"has a \* outside of quotes"),
    ],
)
def test_a_prompt_that_does_not_name_the_lines_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        prompted(text, lines("OPEN")[0])


def test_a_line_with_a_quote_in_it_cannot_be_told():
    with pytest.raises(ValueError, match=r"has a double quote in it.*write single quotes in Text Lines"):
        prompted('a "SAY "HI""', lines('SAY "HI"')[0])


def test_other_encoders_and_widths_are_refused():
    drawn = lines("OPEN")[0]
    with pytest.raises(ValueError, match="reads the prompt with h; lines of text are told to CLIP ViT-L"):
        prompted('a "OPEN"', drawn, clip(SD2))
    with pytest.raises(ValueError, match="makes tokens of 32 numbers, this text encoder's have 24"):
        prompted('a "OPEN"', drawn, made=embedder(32))


# ----------------------------------------------------------------------------------------------------------- Read Text


def test_what_was_drawn_is_read_and_measured():
    drawn, _, _, preview, _ = lines("Palimpsest\nreads 42 lines", width=384, height=256)
    found = read(preview, text_lines=drawn)
    assert found["text"] == "Palimpsest\nreads 42 lines"
    assert (found["exact"], found["ned"]) == (1.0, 1.0)
    assert 0.8 < found["confidence"] <= 1.0
    assert found["picture"].shape == preview.shape
    numbers = json.loads(found["numbers"])
    assert [each["text"] for each in numbers["pictures"][0]] == ["Palimpsest", "reads 42 lines"]
    assert numbers["means"]["exact"] == 1.0


def test_another_text_is_measured_as_far_as_it_is_off():
    drawn, _, _, preview, _ = lines("Palimpsest", width=384, height=256)
    found = read(preview, text_lines=drawn, wanted="PALIMPSEXT")
    assert (found["exact"], found["ned"]) == (0.0, pytest.approx(0.1))
    assert "'Palimpsest' for 'PALIMPSEXT'" in found["report"]
    found = read(preview, text_lines=drawn, wanted="PALIMP SEST", compare="capitals and spaces do not count")
    assert (found["exact"], found["ned"]) == (1.0, 1.0)


def test_nothing_wanted_is_nothing_measured():
    drawn, _, _, preview, _ = lines("Palimpsest", width=384, height=256)
    for where in ({"mask": drawn.positions}, {"bboxes": box(0, 96, 384, 64)}):
        found = read(preview, **where)
        assert found["text"] == "Palimpsest"
        assert math.isnan(found["exact"])
        assert json.loads(found["numbers"])["means"]["ned"] is None


def test_a_picture_of_another_size_is_read_in_the_same_places():
    drawn, _, _, preview, _ = lines("Palimpsest", width=384, height=256)
    larger = torch.nn.functional.interpolate(preview.movedim(-1, 1), (384, 576), mode="bilinear").movedim(1, -1)
    assert read(larger, text_lines=drawn)["exact"] == 1.0


def test_a_place_that_is_much_higher_than_its_line_is_read_around_the_letters():
    drawn, _, _, preview, _ = lines("COFFEE", mask=mask((20, 20, 240, 240)), width=256, height=256, spacing=0.0)
    assert read(preview, text_lines=drawn)["exact"] == 1.0
    assert read(preview, mask=drawn.positions, wanted="COFFEE")["exact"] == 0.0


def test_upright_text_and_several_pictures():
    drawn, _, _, preview, _ = lines("DOWN", mask=mask((100, 10, 150, 246)), width=256, height=256)
    found = read(torch.cat([preview, torch.zeros_like(preview)]), text_lines=drawn)
    first, second = (each[0] for each in json.loads(found["numbers"])["pictures"])
    assert first["text"] == "DOWN"
    assert (second["text"], second["confidence"], second["ned"]) == ("", 0.0, 0.0)
    assert found["exact"] == 0.5
    assert found["picture"].shape == (2, 256, 256, 3)


def test_without_a_place_the_whole_picture_is_one_line():
    _, glyphs, *_ = lines("one line", bboxes=box(0, 0, 256, 64), width=256, height=64)
    assert read(glyphs, wanted="one line")["exact"] == 1.0


def test_what_cannot_be_read_ends_in_a_sentence():
    drawn, _, positions, preview, _ = lines("Palimpsest", width=384, height=256)
    with pytest.raises(ValueError, match="text_lines and mask all say where text stands"):
        read(preview, text_lines=drawn, mask=positions)
    with pytest.raises(ValueError, match="wanted has 2 lines and there are 1 places"):
        read(preview, text_lines=drawn, wanted="a\nb")
