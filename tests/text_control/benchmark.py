"""Exact text on the pocket model: a text control and its embeddings, learned from drawn boards, on texts never seen.

    python dev.py bench text_control                                     gates, table, JSON and sheet
    python dev.py bench text_control --lora-steps 700                    with a LoRA in ink, which it learns first
    python dev.py bench text_control --weights FILE --count 4            other weights, some of it
    python dev.py bench text_control --stage latents --work DIR          draw and encode boards to learn from
    python dev.py bench text_control --stage train --work DIR --minutes 85 [--resume]
    python dev.py bench text_control --stage keep --work DIR [--weights FILE]

The pocket's U-Net knows boards with letters, but not what they say. What is trained is what AnyText trains: a control
and LayerNorm(Linear) of the recogniser's neck, the U-Net frozen (pocket_training). Every measured text has a pair of
letters that no training held, and so has none of the pictures been seen: 2 to 5 letters of 24 to 32 pixels.

Gates come first, for what follows measures nothing where they fail: the recogniser reads the drawn signs, and it reads
them after a way through the autoencoder, which is the row "pasted text" and the best there is.

Written anew: Text Lines, Text Prompt and Apply Text Control make what the host's KSampler samples; every row of a scene
begins with the same noise. Changed in a picture: the sign of a drawn picture says another text, its place is blanked,
the wanted one is written, Keep Outside puts the rest back.

exact, NED: what PP-OCRv3, whose features the embeddings come from, reads in the line's place, small letters counting as
capitals, the only ones of this world; PP-OCRv5: the same by a reader that no training knew (second_reader). "anywhere":
the better of that and of what PP-OCRv3 reads where the letters fit the picture best, which is generous to rows that
know no place. place: IoU of the letters' box with the box where they fit best, 0 where nothing fits. rest: share of
species, colour, pose, side and place that the judge reads off the picture, the board painted over. outside: PSNR to the
source more than 8 pixels away from the text's place, before Keep Outside; behind it those pixels are the source's, bit
for bit, which is checked. s: processor seconds a picture.

With a LoRA: other files (text_lora), and beside the rows that it changes those to compare them with. ink: the share of
pictures nearer to their drawing in ink than to the plain one, and their distance to it, as lora_training measures both.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import numpy as np
import tiny_models
import torch
import torch.nn.functional as F
from benchmarks import pocket_host
from benchmarks.scenes import contact_sheet
from palimpsest.nodes.exact_text import TextEmbedder, TextLines
from palimpsest.nodes.exact_text.nodes import TextLinesNode, TextPrompt
from palimpsest.nodes.keep_outside.nodes import KeepOutside
from palimpsest.nodes.text_control.control import TextControl
from palimpsest.nodes.text_control.nodes import ApplyTextControl
from pocket import autoencoder, checkpoint, metrics, parallel, signs, train, world
from pocket import judge as judging
from rivals.benchmark import table, without_nan
from safetensors.torch import load_file
from text_control import inked, measuring, pocket_control, pocket_signs, pocket_training
from text_control.second_reader import SecondReader

import nodes as host_nodes

WEIGHTS = Path(__file__).resolve().parent / "weights" / "pocket.safetensors"
COLUMNS = {
    "exact": "exact", "exact_latin": "Latin", "exact_chinese": "Chinese", "ned": "NED",
    "exact_second": "exact, PP-OCRv5", "ned_second": "NED, PP-OCRv5",
    "exact_anywhere": "exact anywhere", "ned_anywhere": "NED anywhere",
    "place": "place", "rest": "rest", "ink": "ink", "distance": "ink distance", "outside": "outside dB", "seconds": "s",
}  # fmt: skip
LEAST = 0.8  # of the drawn and the decoded signs have to be read exactly
NEAR = 8  # pixels around a changed text that are not called outside
SHOWN, SHOWN_STYLED = 6, 4  # signs on the sheet
PASTED = "pasted text through the autoencoder"
PASTED_INK = "pasted text in ink through the autoencoder"


# ------------------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True, eq=False)
class Case:
    """A held-out scene: its picture (1, H, W, 3), the line on its sign, and the same scene before the text changed."""

    number: int
    scene: world.Scene
    picture: torch.Tensor
    lines: TextLines
    source: torch.Tensor

    @property
    def caption(self) -> str:
        """The prompt, the line in double quotes."""
        return world.caption(self.scene)


@dataclass(frozen=True, eq=False)
class Tools:
    """The pocket model in the host, the trained parts, and how the host samples."""

    model: Any
    clip: Any
    vae: Any
    control: TextControl
    embedder: TextEmbedder
    steps: int
    guidance: float
    strength: float = 1.0  # of the control

    def words(self, text: str) -> list:
        """CONDITIONING of plain words."""
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def told(self, case: Case, embeddings: bool) -> list:
        """The prompt of a case with a placeholder for its line: the plain token, or the line's look."""
        if not embeddings:
            return self.words(case.caption.replace(f'"{case.scene.sign.text}"', " * "))
        given = {"clip": self.clip, "text_lines": case.lines, "text_embedder": self.embedder, "text": case.caption}
        return tiny_models.execute(TextPrompt, **given)[0]

    def sample(self, positive: list, negative: list, latent: dict, seed: int) -> torch.Tensor:
        """A picture (1, H, W, 3) by the host's KSampler."""
        found = host_nodes.common_ksampler(
            self.model, seed, self.steps, self.guidance, "ddim", "ddim_uniform", positive, negative, latent
        )[0]
        return self.vae.decode(found["samples"]).clamp(0, 1)


def case_of(number: int, scene: world.Scene) -> Case:
    """A case of a scene."""
    left, top, right, bottom = (round(edge) for edge in pocket_signs.box_of(scene.sign))
    box = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    chosen = {"lines": scene.sign.text, "font": pocket_signs.font_of(scene.sign.text).name, "bboxes": box}
    picture = shown([scene])
    lines = tiny_models.execute(TextLinesNode, image=picture, **chosen)[0]
    return Case(number, scene, picture, lines, shown([before(scene, number)]))


def shown(scenes: Sequence[world.Scene]) -> torch.Tensor:
    """Pictures (n, H, W, 3) in 0..1."""
    return metrics.to_float(np.stack([world.render(scene) for scene in scenes]))


def before(scene: world.Scene, number: int) -> world.Scene:
    """The scene with another text on its board, nearly as long as it allows."""
    rng = np.random.default_rng([pocket_signs.HELD_OUT_SEED, number, 1])
    while True:
        text = signs.sample_text(rng, held_out=True)
        if text != scene.sign.text and abs(signs.text_width(text) / signs.text_width(scene.sign.text) - 1) < 0.25:
            return pocket_signs.with_text(scene, text)


# ------------------------------------------------------------------------------------------------ the rows


def pasted(tools: Tools, case: Case) -> torch.Tensor:
    """The drawn answer through the autoencoder."""
    return tools.vae.decode(tools.vae.encode(case.picture)).clamp(0, 1)


def pasted_in_ink(tools: Tools, case: Case) -> torch.Tensor:
    """The answer drawn in ink, through the autoencoder."""
    return tools.vae.decode(tools.vae.encode(inked.in_ink([case.scene]))).clamp(0, 1)


def by_words(tools: Tools, case: Case) -> torch.Tensor:
    """The text in words, as any prompt says it."""
    return tools.sample(tools.words(case.caption), tools.words(""), {"samples": torch.zeros(1, 4, 16, 16)}, case.number)


def anew(tools: Tools, case: Case, *, control: bool, embeddings: bool) -> torch.Tensor:
    """A new picture with what was learned, or a part of it."""
    positive, negative = tools.told(case, embeddings), tools.words("")
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    if control:
        positive, negative, latent, _ = applied(tools, case, positive, negative)
    return tools.sample(positive, negative, latent, case.number)


def applied(tools: Tools, case: Case, positive: list, negative: list, **more: Any) -> tuple:
    """What Apply Text Control gives."""
    given = {"control_net": tools.control, "text_lines": case.lines, "vae": tools.vae, "strength": tools.strength}
    return tiny_models.execute(ApplyTextControl, positive=positive, negative=negative, **given, **more)


def changed(tools: Tools, case: Case, *, keep_rest: bool) -> torch.Tensor:
    """The source with its text changed, before Keep Outside."""
    more = {"picture": case.source, "keep_rest": keep_rest}
    positive, negative, latent, _ = applied(tools, case, tools.told(case, True), tools.words(""), **more)
    return tools.sample(positive, negative, latent, case.number)


def inpainted(tools: Tools, case: Case) -> torch.Tensor:
    """The host's own way: the text in words, the text's place alone noised."""
    latent = {"samples": tools.vae.encode(case.source), "noise_mask": case.lines.positions}
    return tools.sample(tools.words(case.caption), tools.words(""), latent, case.number)


NEW: dict[str, Callable[[Tools, Case], torch.Tensor]] = {
    "prompt only": by_words,
    "embeddings alone": partial(anew, control=False, embeddings=True),
    "control alone": partial(anew, control=True, embeddings=False),
    "both": partial(anew, control=True, embeddings=True),
}
CHANGED: dict[str, Callable[[Tools, Case], torch.Tensor]] = {
    "host: prompt, noise in the place": inpainted,
    "both, changed in a picture": partial(changed, keep_rest=False),
    "both, changed, keep_rest": partial(changed, keep_rest=True),
}


def kept(case: Case, pictures: torch.Tensor) -> torch.Tensor:
    """The picture behind Keep Outside. Raises RuntimeError where a pixel outside is another."""
    mask = case.lines.positions
    (found, *_) = tiny_models.execute(KeepOutside, edited=pictures, source=case.source, mask=mask, feather=0)
    outside = mask[..., None] == 0
    if not torch.equal(found * outside, case.source * outside):
        raise RuntimeError(f"Keep Outside: pixels of picture {case.number} outside of the text's place changed")
    return found


def far_from(case: Case) -> torch.Tensor:
    """1 - the text's place with what is near it, (1, H, W)."""
    return 1 - F.max_pool2d(case.lines.positions[None], 2 * NEAR + 1, 1, NEAR)[0]


def with_lora(tools: Tools, state: dict[str, torch.Tensor], strength_clip: float) -> Tools:
    """The tools with a LoRA of the narrow U-Net on model and text encoder."""
    model, clip = comfy.sd.load_lora_for_models(tools.model, tools.clip, state, 1.0, strength_clip)
    return replace(tools, model=model, clip=clip)


def lora_of(options: argparse.Namespace, tools: Tools) -> tuple[str, dict[str, torch.Tensor]] | None:
    """(what it is, its factors for the narrow U-Net) of the LoRA to draw with, learned first where steps are told."""
    if options.lora:
        return "LoRA", checkpoint.narrow_lora(load_file(options.lora))
    if options.lora_steps:
        pocket = (tools.model, tools.clip, tools.vae)
        return "ink LoRA", load_file(inked.learned(pocket, options.output, options.lora_steps))
    return None


def rows_of(tools: Tools, lora: tuple | None, chosen: Sequence[str] | None) -> dict[str, tuple[Tools, Callable, bool]]:
    """Every row: the tools, what draws it, and whether it changes a picture."""
    found = {PASTED: (tools, pasted, False)}
    if lora:
        kind, state = lora
        found["both"] = (tools, NEW["both"], False)
        for strength in (1.0, 0.0):
            found[f"both + {kind}, CLIP {strength:g}"] = (with_lora(tools, state, strength), NEW["both"], False)
        found[PASTED_INK] = (tools, pasted_in_ink, False)
    else:
        found |= {name: (tools, draw, False) for name, draw in NEW.items()}
        found |= {name: (tools, draw, True) for name, draw in CHANGED.items()}
    return {name: row for name, row in found.items() if not chosen or name in chosen}


# ------------------------------------------------------------------------------------------------ the runs


def gates(cases: list[Case], judge: judging.Judge, second: SecondReader | None) -> dict[str, dict]:
    """What is read of the drawn signs, and of the decoded ones. Exits where the rest would measure nothing."""
    lines, scenes = [case.lines for case in cases], [case.scene for case in cases]
    drawn = torch.cat([case.picture for case in cases])
    decoded = autoencoder.round_trip(autoencoder.load(), drawn)
    found = {}
    for name, pictures in (("drawn signs", drawn), ("decoded signs", decoded)):
        found[name] = measuring.measured(pictures, lines, scenes, judge, second)[0]
        print(f"gate: {name} read exactly {found[name]['exact']:.2f}, NED {found[name]['ned']:.3f}", flush=True)
        if found[name]["exact"] < LEAST:
            raise SystemExit(f"less than {LEAST} of the {name} are read exactly: the rest would say nothing.")
    return found


def measure(
    rows: dict[str, tuple], cases: list[Case], judge: judging.Judge, second: SecondReader | None, *, style: bool
) -> tuple[dict, dict]:
    """(numbers of every row, its pictures). style: how much of the ink shows, too."""
    lines, scenes = [case.lines for case in cases], [case.scene for case in cases]
    plain, ink = torch.cat([case.picture for case in cases]), inked.in_ink(scenes)
    numbers, pictures = {}, {}
    for name, (tooled, draw, edits) in rows.items():
        began = time.process_time()
        found = torch.cat([draw(tooled, case) for case in cases])
        seconds, outside = (time.process_time() - began) / len(cases), float("nan")
        if edits:
            sources, far = torch.cat([c.source for c in cases]), torch.cat([far_from(c) for c in cases])
            outside = metrics.psnr(found, sources, far).mean().item()
            found = torch.cat([kept(case, picture[None]) for case, picture in zip(cases, found, strict=True)])
        means, each = measuring.measured(found, lines, scenes, judge, second)
        means |= inked.styled(found, ink, plain) if style else {"ink": float("nan"), "distance": float("nan")}
        numbers[name] = means | {"outside": outside, "seconds": seconds, "read": {e.text: e.read for e in each}}
        pictures[name] = found
        print(f"{name}: exact {means['exact']:.2f}, NED {means['ned']:.2f}, place {means['place']:.2f}", flush=True)
    return numbers, pictures


def stage_latents(options: argparse.Namespace) -> None:
    """Draw and encode boards."""
    pocket_signs.encode(options.work / "signs", options.pictures, options.processes)


def stage_train(options: argparse.Namespace) -> None:
    """Learn from them, in processes that average their gradients."""
    given = {"minutes": options.minutes, "steps": options.steps, "lr": options.lr, "seed": options.seed}
    wanted = train.Options(
        work=options.work, device="cpu", processes=options.processes, batch=8, resume=options.resume, **given
    )
    torch.set_num_threads(1)
    parallel.run(pocket_training.train_control, pocket_training.count(options.work), options.processes, wanted)


def stage_keep(options: argparse.Namespace) -> None:
    """Write what a training left as --weights, with its steps and minutes."""
    state = torch.load(options.work / pocket_training.STATE, map_location="cpu", weights_only=True)
    control, projection, told = pocket_control.load(options.work / pocket_training.FILE)
    told |= {"steps": str(state["step"]), "minutes": f"{state['seconds'] / 60:.0f}", "batch": "8"}
    options.weights.parent.mkdir(parents=True, exist_ok=True)
    pocket_control.save(options.weights, control, projection, told)
    print(f"{options.weights}: {options.weights.stat().st_size / 1e6:.1f} MB, {told}")


def stage_measure(options: argparse.Namespace) -> None:
    """Gates, rows, table, sheet."""
    pocket_signs.register_fonts()
    comfy.utils.set_progress_bar_enabled(False)
    with torch.inference_mode():
        model, clip, vae = pocket_host.load_pocket(narrow=True)
        control, embedder = pocket_control.narrow(options.weights)
        tools = Tools(model, clip, vae, control, embedder, options.sampling_steps, options.guidance, options.strength)
        cases = [case_of(number, scene) for number, scene in enumerate(pocket_signs.held_out(options.count))]
        judge, second = judging.load(), SecondReader(options.second_reader) if options.second_reader else None
        passed = gates(cases, judge, second)
        lora = lora_of(options, tools)
        rows = rows_of(tools, lora, options.rows)
        numbers, pictures = measure(rows, cases, judge, second, style=lora is not None)
        more = {"lora_steps": options.lora_steps} if lora else {}
        more |= {"star_moved": inked.star_moved(tools, with_lora(tools, lora[1], 1.0), cases)} if lora else {}
    written = table(COLUMNS, numbers, lambda column: 1 if column in ("outside", "seconds") else 2)
    print(written)
    *_, told = pocket_control.load(options.weights)
    content = {"gates": passed, "rows": numbers, "training": told, **where(options, model), **more}
    path = options.output / ("text_lora.json" if lora else "text_control.json")
    path.write_text(json.dumps(without_nan(content), indent=2) + "\n", "utf-8")
    path.with_suffix(".md").write_text(written + "\n", "utf-8")
    sheet = {"the drawn answer": torch.cat([case.picture for case in cases])}
    sheet |= {} if lora else {"the text to change": torch.cat([case.source for case in cases])}
    few = {name: found[: SHOWN_STYLED if lora else SHOWN] for name, found in (sheet | pictures).items()}
    contact_sheet(few, path.with_suffix(".jpg"))


def where(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """On what it was measured."""
    import platform

    return {
        "signs": options.count, "steps": options.sampling_steps, "guidance": options.guidance, "sampler": "ddim",
        "strength": options.strength,
        "dtype": str(model.model.get_dtype()), "machine": platform.machine(), "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip


STAGES = {"latents": stage_latents, "train": stage_train, "keep": stage_keep, "measure": stage_measure}


def main() -> None:
    """Run a stage."""
    parser = argparse.ArgumentParser(prog="python dev.py bench text_control", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=STAGES, default="measure")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="what was trained, packed")
    parser.add_argument("--count", type=int, default=32, help="held-out signs")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--strength", type=float, default=1.0, help="of the control")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="some of them, by their names in the table")
    parser.add_argument("--second-reader", type=Path, metavar="WHEEL", help="see tests/text_control/second_reader.py")
    parser.add_argument("--lora", type=Path, help="a LoRA of the pocket's checkpoint to draw with as well")
    parser.add_argument("--lora-steps", type=int, default=0, help="of learning one in ink first, kept in --output")
    parser.add_argument("--work", type=Path, help="folder of a training")
    parser.add_argument("--pictures", type=int, default=6144, help="drawn to learn from")
    parser.add_argument("--minutes", type=float, help="of training")
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from the state in the work folder")
    options, output = pocket_host.parse(parser)
    options.output = output
    if options.stage != "measure" and options.work is None:
        parser.error(f"--stage {options.stage} needs --work")
    STAGES[options.stage](options)


if __name__ == "__main__":
    main()
