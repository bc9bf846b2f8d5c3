"""Instruction editing, whole: a language model says what an instruction means, an 8-channel U-Net makes it.

    python dev.py bench instruction --work DIR                    tables, JSON and contact sheet
    python dev.py bench instruction --work DIR --count 4          fewer edits
    python dev.py bench instruction --work DIR --stage language   train the language model, 20 minutes of one core
    python dev.py bench instruction --work DIR --stage head       train MGIE's edit head on it, or go on, by the node

DIR has unet_edit.safetensors of `bench instruction_training`, and the language model (pocket_language.py, in MGIE's
layout) with its edit head where they were trained there; else those of tests/instruction/models are taken. Without any
U-Net the pocket's own stands in, which is not shown the picture.

32 held-out scenes and instructions, half of them vague ("let it rest", "move it to the other side"). Each is edited by
the instruction as it is (raw), by what Express Instruction makes of it and of the picture (expressed), and by the ideal
result in words (by hand), from new noise, under the host's two guidances; then with Cross-Attention Mask on the words
that the picture's own caption does not have (of an instruction: all words), with Feature Blend from the re-noised
source, with both, and with both and Keep Outside. Masks are the world's: both animals and their shadows; of a new
colour the animal; of a new place all but the animal. One row has masks by Find Words in Picture, of the animal that the
expressed text names. Where two texts are equal the picture is drawn once.

right: all five attributes that a caption tells; edited: the one that was to change. outside: where the mask is black,
against the source. leakage: share of those words' attention outside of the mask. Prompt swap and KV Inversion
(recorded, nothing learned) draw the expressed text with the pocket's own U-Net from inverted noise, which the source's
caption was inverted with: a text that the other rows are not told.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from benchmarks import pocket_host
from benchmarks.scenes import Scenes, contact_sheet, defaults, drawn, mean
from instruction import pocket_head, pocket_language
from instruction_training import benchmark as training
from instruction_training import pocket_triples
from instruction_training.pocket_triples import Triple
from palimpsest.nodes.attention_map.nodes import AttentionMap, FindWords, ReadAttentionMap
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.feature_blend.nodes import FeatureBlend
from palimpsest.nodes.instruction.heads import HEADS, OF_FOLDER
from palimpsest.nodes.instruction.nodes import EditInstruction, ExpressInstruction, LoadMGIE
from palimpsest.nodes.inversion.nodes import Invert
from palimpsest.nodes.keep_outside.nodes import KeepOutside
from palimpsest.nodes.words.nodes import SelectWords
from pocket import checkpoint, metrics, world
from pocket import judge as judging
from pocket import train as pocket_training
from rivals.benchmark import ours, prompt_swap, setting, table, without_nan
from torch import Tensor

KINDS = {"plain": False, "vague": True}
RAW, EXPRESSED, HAND, HEAD = "raw instruction", "expressed", "written by hand", "edit head"
PLAIN, CAM, PFB, BOTH, KEPT = (
    "no mask", "Cross-Attention Mask", "Feature Blend", "both", "both + Keep Outside",
)  # fmt: skip
FOUND = "both, mask found by words"
ONLY = {HEAD: (PLAIN, BOTH, KEPT)}  # methods of a text, where it has not all
SWAPPED, KV = "prompt swap after DDIM", "KV Inversion, recorded only"
IDEAL, UNEDITED = "ideal edit through the autoencoder", "source, not edited"
COLUMNS = {
    "right": "all right", "edited": "edited", "identity": "identity", "ideal": "PSNR to ideal", "outside": "outside dB",
    "leakage": "leakage", "found": "mask found",
}  # fmt: skip
MODELS = Path(__file__).parent / "models"
DECIBELS = ("ideal", "outside")
NO_TEXT = "a"  # for prompts of which the ones without text are used
END = 0.5  # of the source's features: of .4 to 1 with the latent held to .3 to .8, best on held-out scenes 32 to 47
FEATHER = 2  # of Keep Outside: to these pictures what 8 is to one of 512
SHOWN = 2  # edits of each kind on the contact sheet
ON_SHEET = {
    f"{RAW}": (RAW, PLAIN), f"{EXPRESSED}": (EXPRESSED, PLAIN), f"{EXPRESSED}, both": (EXPRESSED, BOTH),
    f"{EXPRESSED}, {KEPT}": (EXPRESSED, KEPT), f"{HAND}": (HAND, PLAIN),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the models


def edit_model(work: Path) -> tuple[Any, Any, Any]:
    """(model, clip, vae) of the pocket's instruction model in the host, its U-Net in its own width."""
    import comfy.model_patcher
    import comfy.sd

    trained = next((path for path in (work / training.UNET, MODELS / training.UNET) if path.exists()), None)
    print(f"U-Net: {trained or 'the pocket model, which is not shown the picture'}", flush=True)
    state, mean_, std = training.settings_of(trained)
    network = training.build(state)
    parts, _ = checkpoint.load_weights(checkpoint.WEIGHTS / checkpoint.AUTOENCODER)
    whole = checkpoint.assemble(network.state_dict(), parts, latent_mean=mean_, latent_std=std)
    work.mkdir(parents=True, exist_ok=True)
    pocket_training.save_weights(work / training.CHECKPOINT, whole)
    model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(work / training.CHECKPOINT))
    base = type(model.model)(model.model.model_config, model.model.model_type, device="cpu")
    network.dtype = torch.float32
    base.diffusion_model = network.eval().requires_grad_(False)
    return comfy.model_patcher.CoreModelPatcher(base, model.load_device, model.offload_device), clip, vae


def language_model(work: Path) -> Any:
    """The edit head of Load MGIE, which the language model hangs on; one that was trained in `work` before others."""
    import folder_paths

    trained = work / pocket_language.NAME
    folder = trained if trained.exists() else MODELS / pocket_language.NAME
    if not folder.exists():
        raise SystemExit(f"{trained} is not there: python dev.py bench instruction --work {work} --stage language")
    folder_paths.add_model_folder_path("palimpsest_mgie", str(folder.parent), is_default=True)
    own = HEADS.folder, str(work)
    folder_paths.add_model_folder_path(*own, is_default=True)
    file = pocket_head.NAME if (work / pocket_head.NAME).exists() else OF_FOLDER
    return LoadMGIE.execute(folder=folder.name, dtype="float32", head_file=file).args[1]


def expressed(mgie: Any, triples: list[Triple]) -> tuple[list[str], Any]:
    """(texts, edit head that has read them): what Express Instruction makes of scenes and instructions."""
    pictures, _ = drawn([each.source for each in triples])
    lines = "\n".join(each.instruction for each in triples)
    chosen = defaults(ExpressInstruction) | {"instruction": lines, "max_tokens": 24}
    text, head, _ = ExpressInstruction.execute(pictures, mgie=mgie, **chosen).args
    return text.split("\n"), head


def reading(texts: list[str], triples: list[Triple]) -> dict[str, dict[str, float]]:
    """Of plain and of vague instructions: share of texts that are the ideal's, and of each attribute that they tell."""
    found = {}
    for kind, vague in KINDS.items():
        pairs = [(text, each) for text, each in zip(texts, triples, strict=True) if each.vague == vague]
        told = {name: float(np.mean([says(text, name, each.edited) for text, each in pairs]))
                for name in world.CAPTIONED}  # fmt: skip
        exact = float(np.mean([text == each.expressed for text, each in pairs]))
        found[kind] = {"texts": len(pairs), "exact": exact, **told}
    return found


def says(text: str, attribute: str, scene: world.Scene) -> bool:
    value = getattr(scene, attribute)
    wanted = world.PLACE_PHRASES[value] if attribute == "place" else value
    return f" {wanted} " in f" {text} "


# ------------------------------------------------------------------------------------------------------------ the edits


@dataclass(frozen=True)
class Models:
    """What every edit is made with."""

    model: Any
    clip: Any
    vae: Any
    steps: int
    text: float
    picture: float


@dataclass(eq=False)
class Case:
    """One edit, ready for a sampler. mask (1, H, W): white where it may change; `drawn`: results by text and method."""

    number: int
    triple: Triple
    pixels: Tensor
    mask: Tensor
    models: Models
    head: Any = None
    trajectory: Any = None
    drawn: dict = field(default_factory=dict)

    @classmethod
    def of(cls, number: int, triple: Triple, models: Models, head: Any = None) -> Case:
        """The picture inverted by the prompt that has the picture and no text; head: an edit head that has read it."""
        pixels, _ = drawn([triple.source])
        made = cls(number, triple, pixels, ideal_mask(triple), models, head)
        chosen = defaults(Invert) | {"steps": models.steps, "reconstruction_guidance": 0.0}
        latent = {"samples": models.vae.encode(pixels)}
        made.trajectory = Invert.execute(models.model, latent, made.prompts(NO_TEXT)[1], **chosen).args[0]
        return made

    @property
    def attribute(self) -> str:
        """What is to change."""
        return changed(self.triple)

    @cache  # noqa: B019  (as long as the cases)
    def prompts(self, text: str) -> tuple[list, list, list, dict]:
        """(text and picture, picture alone, neither, empty latent), by Edit Instruction and the host's own node."""
        from comfy_extras.nodes_ip2p import InstructPixToPixConditioning

        routed = {"route": "edit head", "edit_head": self.head, "text": ""}
        routed = routed if text == HEAD else {"route": "expressed text", "clip": self.models.clip, "text": text}
        said, without, negative, _ = EditInstruction.execute(**routed).args
        seen = InstructPixToPixConditioning.execute(said, without, self.pixels, self.models.vae)
        first, second, latent = getattr(seen, "args", seen)
        return first, second, negative, latent

    @cache  # noqa: B019
    def words(self, text: str) -> Any:
        """TOKENS of what a text says and the picture's caption does not; all of an instruction; no TOKENS of a head."""
        if text == HEAD:
            return None
        known = set(world.caption(self.triple.source).split())
        fresh = [] if text == self.triple.instruction else [word for word in text.split() if word not in known]
        return SelectWords.execute(self.models.clip, text, ", ".join(dict.fromkeys(fresh)) or text).args[0]

    def blended(self, model: Any, mask: Tensor) -> Any:
        """Feature Blend, outside of the mask the source under the very noise that is sampled from."""
        chosen = {"source_latents": "re-noised source", "seed": self.number, "end_percent": END}
        chosen = defaults(FeatureBlend) | chosen
        return FeatureBlend.execute(model, self.trajectory, self.prompts(NO_TEXT)[1], mask=mask, **chosen).args[0]

    def found_mask(self, text: str) -> Tensor:
        """The mask by the animal that a text names."""
        named = next((word for word in text.split() if word in world.SPECIES), text)
        tokens = SelectWords.execute(self.models.clip, text, named).args[0]
        looking = (self.models.model, self.trajectory, tokens, self.prompts(text)[0])
        record = FindWords.execute(*looking, **defaults(FindWords)).args[0]
        found = ReadAttentionMap.execute(record, image=self.pixels, **defaults(ReadAttentionMap)).args[1]
        return 1 - found if self.attribute == "place" else found

    def draw(self, text: str, method: str) -> tuple[Tensor, dict[str, float]]:
        """(picture, what was measured while it was drawn); once for every text."""
        if (text, method) not in self.drawn:
            self.drawn[text, method] = METHODS[method](self, text)
        return self.drawn[text, method]

    def sample(self, text: str, mask: Tensor | None, cam: bool, pfb: bool) -> tuple[Tensor, dict[str, float]]:
        """From new noise under both guidances, by the host's sampler."""
        import comfy.sample
        import comfy.samplers
        from comfy_extras.nodes_custom_sampler import DualCFGGuider

        models, tokens = self.models, self.words(text)
        mask = self.mask if mask is None else mask
        model = self.blended(models.model, mask) if pfb else models.model
        if cam:
            model = CrossAttentionMask.execute(model, mask, tokens=tokens, **defaults(CrossAttentionMask)).args[0]
        record = None
        if tokens is not None:
            model, record = AttentionMap.execute(model, tokens, **defaults(AttentionMap)).args
        first, second, negative, latent = self.prompts(text)
        guider = DualCFGGuider.execute(model, first, second, negative, models.text, models.picture, "regular")
        (guider,) = getattr(guider, "args", guider)
        empty = latent["samples"]
        noise = comfy.sample.prepare_noise(empty, self.number)
        solver, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor(self.trajectory.sigmas)
        made = guider.sample(noise, empty, solver, sigmas, disable_pbar=True, seed=self.number)
        return models.vae.decode(made).clamp(0, 1), {} if record is None else {"leakage": self.leakage(record, made)}

    def leakage(self, record: Any, latent: Tensor) -> float:
        """Share of the words' attention outside of the mask."""
        read = defaults(ReadAttentionMap) | {"start_percent": 0.0, "label": False}
        return ReadAttentionMap.execute(record, samples={"samples": latent}, mask=self.mask, **read).args[3]


def kept(case: Case, text: str) -> tuple[Tensor, dict[str, float]]:
    """What both drew, put into the source by Keep Outside."""
    picture, _ = case.draw(text, BOTH)
    chosen = defaults(KeepOutside) | {"feather": FEATHER}
    return KeepOutside.execute(case.pixels, picture, case.mask, **chosen).args[0], {}


def found(case: Case, text: str) -> tuple[Tensor, dict[str, float]]:
    """Both by a mask that words find; also its overlap with the world's."""
    mask = case.found_mask(text)
    a, b = mask > 0.5, case.mask > 0.5
    picture, told = case.sample(text, mask, cam=True, pfb=True)
    return picture, told | {"found": (a & b).sum().item() / max((a | b).sum().item(), 1)}


METHODS: dict[str, Callable[[Case, str], tuple[Tensor, dict[str, float]]]] = {
    PLAIN: partial(Case.sample, mask=None, cam=False, pfb=False),
    CAM: partial(Case.sample, mask=None, cam=True, pfb=False),
    PFB: partial(Case.sample, mask=None, cam=False, pfb=True),
    BOTH: partial(Case.sample, mask=None, cam=True, pfb=True),
    KEPT: kept,
    FOUND: found,
}


def changed(triple: Triple) -> str:
    """The attribute that an edit changes."""
    return next(name for name in world.CAPTIONED if getattr(triple.source, name) != getattr(triple.edited, name))


def ideal_mask(triple: Triple) -> Tensor:
    """Where the ideal edit differs from the source, (1, H, W)."""
    (_, source), (_, edited) = drawn([triple.source]), drawn([triple.edited])
    if changed(triple) == "place":
        return 1 - torch.maximum(source, edited)
    if changed(triple) == "colour":
        return torch.maximum(source, edited)
    shadows = [world.render_parts(scene)["shadow"] > 0.01 for scene in (triple.source, triple.edited)]
    return torch.maximum(torch.maximum(source, edited), torch.from_numpy(np.maximum(*shadows)).float())


# ----------------------------------------------------------------------------------------------------------- the rivals


class Pictures(Scenes):
    """The triples' sources, inverted with their captions for the pocket's own U-Net."""

    def __init__(self, triples: list[Triple], steps: int):
        self.steps, self.sources = steps, [each.source for each in triples]
        self.pictures, self.masks = drawn(self.sources)
        self.model, self.clip, self.vae = pocket_host.load_pocket(narrow=True)
        self.was, self.nothing = self.encode(self.sources), self.encode([None] * len(triples))
        self.latent = {"samples": self.vae.encode(self.pictures)}
        self.invert()


def rivals(triples: list[Triple], texts: list[str], steps: int, guidance: float) -> dict[str, Tensor]:
    """Pictures of other ways, by the expressed texts."""
    scenes = Pictures(triples, steps)
    prompt, ways = scenes.encode_texts(texts), {SWAPPED: prompt_swap, KV: partial(ours, recorded=True)}
    return {name: scenes.decode(way(scenes, guidance).draw(prompt)) for name, way in ways.items()}


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Measure:
    """Numbers of edited pictures, of plain and of vague instructions."""

    cases: list[Case]

    def __call__(self, pictures: Tensor, told: list[dict[str, float]] | None = None) -> dict[str, dict[str, float]]:
        """By kind; told: what was measured of each picture while it was drawn."""
        each = self.of_each(pictures) | {
            name: torch.tensor([one.get(name, torch.nan) for one in told or [{}] * len(self.cases)])
            for name in ("leakage", "found")
        }
        found = {}
        for kind, vague in KINDS.items():
            rows = [number for number, case in enumerate(self.cases) if case.triple.vague == vague]
            found[kind] = {name: mean(values[rows]) if rows else torch.nan for name, values in each.items()}
        return found

    def of_each(self, pictures: Tensor) -> dict[str, Tensor]:
        """Of every picture, (B,) each."""
        judge, scenes = judging.load(), [case.triple.edited for case in self.cases]
        source = torch.cat([case.pixels for case in self.cases])
        outside = torch.cat([(case.mask == 0).float() for case in self.cases])
        answers = metrics.right_answers(judging.ask(judge, pictures), scenes, world.CAPTIONED)
        edited = [answers[case.attribute][number] for number, case in enumerate(self.cases)]
        return {
            "right": torch.stack(list(answers.values())).amin(0),
            "edited": torch.stack(edited),
            "identity": metrics.identity(judge, pictures, scenes)["score"],
            "ideal": metrics.psnr(pictures, drawn(scenes)[0]),
            "outside": metrics.psnr(pictures, source, outside).clamp(max=99),
        }


def compare(
    cases: list[Case], texts: dict[str, list[str]], others: dict[str, Tensor], methods: list[str] | None = None
) -> tuple[dict, dict]:
    """(numbers by row, pictures by row) of all texts, methods and rivals; methods: where not all are wanted."""
    measure, rows, pictures = Measure(cases), {}, {}
    asked = [(text, method) for text in texts for method in ONLY.get(text, METHODS)
             if (method != FOUND or text == EXPRESSED) and method in (methods or METHODS)]  # fmt: skip
    for text, method in asked:
        began = time.process_time()
        made = [case.draw(said, method) for case, said in zip(cases, texts[text], strict=True)]
        name = f"{text}, {method}"
        pictures[text, method] = torch.cat([picture for picture, _ in made])
        rows[name] = measure(pictures[text, method], [told for _, told in made])
        print(f"{name}, {time.process_time() - began:.0f} s: {rows[name]}", flush=True)
    for name, found in others.items():
        rows[name] = measure(found)
        pictures[name] = found
    return rows, pictures


def tables(rows: dict[str, dict]) -> str:
    """A markdown table for each kind of instruction."""
    text = []
    for kind in KINDS:
        found = {name: row[kind] for name, row in rows.items()}
        text += [f"### {kind} instructions", "", table(COLUMNS, found, lambda name: 1 if name in DECIBELS else 2), ""]
    return "\n".join(text)


def sheet_rows(cases: list[Case], pictures: dict) -> dict[str, Tensor]:
    """Rows of the contact sheet: some plain edits, then as many vague ones."""
    shown = [n for vague in KINDS.values()
             for n in [n for n, case in enumerate(cases) if case.triple.vague == vague][:SHOWN]]  # fmt: skip
    rows = {
        "source": torch.cat([case.pixels for case in cases]),
        "ideal edit": drawn([case.triple.edited for case in cases])[0],
        **{name: pictures[key] for name, key in ON_SHEET.items()},
        **{name: pictures[name] for name in (SWAPPED, KV) if name in pictures},
    }
    return {name: found[shown] for name, found in rows.items()}


# ----------------------------------------------------------------------------------------------------------- the stages


def stage_language(options: argparse.Namespace, output: Path) -> None:
    """Train the language model and say how it reads scenes that it never saw."""
    with torch.inference_mode(False):
        pocket_language.train(options.work, options.minutes, options.scenes_seen, options.resume)
    triples = pocket_triples.held_out(options.readings)
    print(json.dumps(reading(expressed(language_model(options.work), triples)[0], triples), indent=2))


def stage_head(options: argparse.Namespace, output: Path) -> None:
    """Train a new edit head on the language model of DIR, or go on."""
    head = language_model(options.work)
    print(pocket_head.train(options.work, edit_model(options.work), replace(head, network=None, embeddings=None),
                            options.triples))  # fmt: skip


def stage_edits(options: argparse.Namespace, output: Path) -> None:
    """Everything that is measured."""
    triples = pocket_triples.held_out(max(options.readings, options.count))
    said, head = expressed(language_model(options.work), triples)
    read, triples, said = reading(said, triples), triples[: options.count], said[: options.count]
    texts = {RAW: [each.instruction for each in triples], EXPRESSED: said, HAND: [each.expressed for each in triples]}
    if head.network is not None:
        texts[HEAD] = [HEAD] * len(triples)
    models = Models(*edit_model(options.work), options.steps, options.guidance, options.picture_guidance)
    heads = [head.reading((each,)) for each in head.readings]
    cases = [Case.of(number, each, models, heads[number]) for number, each in enumerate(triples)]
    if options.only:
        print(tables(compare(cases, {options.only: texts[options.only]}, {}, options.methods)[0]))
        return
    ends = drawn([each.edited for each in triples])[0], torch.cat([case.pixels for case in cases])
    others = rivals(triples, said, options.rival_steps, options.rival_guidance)
    for name, pictures in zip((IDEAL, UNEDITED), ends, strict=True):
        others[name] = torch.cat([models.vae.decode(models.vae.encode(each[None])) for each in pictures]).clamp(0, 1)
    rows, pictures = compare(cases, texts, others)
    text = tables(rows)
    print("\n" + text)
    told = SimpleNamespace(first=0, scenes=options.count, steps=options.steps, guidance=options.guidance,
                           full_width=False)  # fmt: skip
    numbers = setting(told, SimpleNamespace(model=models.model)) | {
        "picture guidance": options.picture_guidance,
        "steps of rivals": options.rival_steps,
        "guidance of rivals": options.rival_guidance,
        "reading": read,
        "rows": rows,
        "texts": [{"vague": each.vague, "instruction": each.instruction, "expressed": text, "by hand": each.expressed}
                  for each, text in zip(triples, said, strict=True)],
    }  # fmt: skip
    (output / "instruction.json").write_text(json.dumps(without_nan(numbers), indent=2) + "\n", encoding="utf-8")
    (output / "instruction.md").write_text(text, encoding="utf-8")
    contact_sheet(sheet_rows(cases, pictures), output / "instruction.jpg")


STAGES = {"language": stage_language, "head": stage_head, "edits": stage_edits}


def main() -> None:
    """Parse, run, print, write output/bench."""
    parser = argparse.ArgumentParser(prog="python dev.py bench instruction", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the trained U-Net, and of what is trained")
    parser.add_argument("--stage", choices=STAGES, default="edits")
    parser.add_argument("--count", type=int, default=32, help="held-out edits")
    parser.add_argument("--readings", type=int, default=128, help="held-out texts by which the reading is measured")
    parser.add_argument("--steps", type=int, default=training.STEPS)
    parser.add_argument("--guidance", type=float, default=training.TEXT_GUIDANCE, help="of the text")
    parser.add_argument("--picture-guidance", type=float, default=training.PICTURE_GUIDANCE)
    parser.add_argument("--rival-steps", type=int, default=20)
    parser.add_argument("--rival-guidance", type=float, default=3.0)
    parser.add_argument("--minutes", type=float, default=20.0, help="of the processor, for the language model")
    parser.add_argument("--scenes-seen", type=int, default=16000, help="scenes that the language model learns from")
    parser.add_argument("--only", choices=(RAW, EXPRESSED, HAND, HEAD), help="print this text's rows; nothing is kept")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), help="of --only, default all")
    parser.add_argument("--triples", type=int, default=500, help="that the edit head learns from")
    parser.add_argument("--resume", action="store_true", help="go on with the language model's training")
    options, output = pocket_host.parse(parser)
    with torch.inference_mode():
        STAGES[options.stage](options, output)
    print(f"{time.process_time() / 60:.1f} minutes of the processor")


if __name__ == "__main__":
    main()
