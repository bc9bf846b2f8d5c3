"""The tables of docs/results.md, written from what the benchmarks saved.

In a document a table stands between `<!-- table NAME -->` and `<!-- end of table -->`; TABLES says what it shows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
BLOCK = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n).*?(<!-- end of table -->)", re.S)
BEYOND = "the ideal edit, through the autoencoder"  # a bound, never the best of a column
Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """One column: where its numbers stand below a row, how they are written, and which is the best of them."""

    title: str
    paths: tuple[Path_, ...]
    digits: int | tuple[int, ...] = 2  # of all of its numbers, or of each
    best: Callable[[list[float]], float] | None = None
    unit: str = ""
    between: str = " / "

    def cell(self, scores: dict, best: tuple[float | None, ...]) -> str:
        """The numbers of a row, `between` them what is said, the best in bold; empty where the row has none."""
        numbers = [at(scores, path) for path in self.paths]
        if all(number is None for number in numbers):
            return ""
        digits = self.digits if isinstance(self.digits, tuple) else (self.digits,) * len(numbers)
        shown = ["-" if number is None else f"{number:.{d}f}" for number, d in zip(numbers, digits, strict=True)]
        bold = [f"**{s}**" if s != "-" and b is not None and s == f"{b:.{d}f}" else s
                for s, b, d in zip(shown, best, digits, strict=True)]  # fmt: skip
        return self.between.join(bold) + self.unit

    def has(self, row: dict) -> bool:
        """Whether a row has a number for it."""
        return any(at(row, path) is not None for path in self.paths)

    def best_of(self, rows: list[dict]) -> tuple[float | None, ...]:
        """The best number at each path."""
        if self.best is None:
            return (None,) * len(self.paths)
        known = ([n for n in (at(row, path) for row in rows) if n is not None] for path in self.paths)
        return tuple(self.best(numbers) if numbers else None for numbers in known)


@dataclass(frozen=True)
class Table:
    """Rows of a file of results: `rows` gives each its label, `inside` leads to them.

    incomplete: rows that the file does not have, and columns of which no row has a number, are left out.
    """

    source: str
    inside: Path_
    rows: dict[str, str]
    columns: tuple[Column, ...]
    head: str = ""
    turned: bool = False  # the file has a kind of edit first, then the rows, some of them for some kinds only
    bounds: Path_ = ()  # where the rows that are no methods stand; their scores have no costs beside them
    incomplete: bool = False

    def lines(self, results: Path = RESULTS) -> Iterator[str]:
        """Markdown, line by line."""
        data = json.loads((results / self.source).read_text(encoding="utf-8"))
        known = {**at(data, self.inside), **(at(data, self.bounds) if self.bounds else {})}
        wanted = {name: label for name, label in self.rows.items() if not self.incomplete or name in known}
        chosen = {label: self._row(data, name) for name, label in wanted.items()}
        measured = [row for label, row in chosen.items() if not label.startswith(BEYOND)]
        columns = [column for column in self.columns if not self.incomplete or any(map(column.has, measured))]
        best = [column.best_of(measured) for column in columns]
        yield f"| {self.head} | " + " | ".join(column.title for column in columns) + " |"
        yield "|---" * (len(columns) + 1) + "|"
        for label, row in chosen.items():
            yield f"| {label} | " + " | ".join(map(Column.cell, columns, [row] * len(best), best)) + " |"

    def _row(self, data: dict, name: str) -> dict:
        rows, bounds = at(data, self.inside), at(data, self.bounds) if self.bounds else {}
        if name in bounds:
            return {"scores": bounds[name]}
        if not self.turned:
            return rows[name]
        found = {kind: rows[kind][name] for kind in rows if isinstance(rows[kind], dict) and name in rows[kind]}
        if not found:
            raise KeyError(name)
        return found


def at(data: Any, path: Path_) -> Any:
    """What stands at the end of a path of keys; None where it breaks off or is no number."""
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    return None if isinstance(data, float) and math.isnan(data) else data


def filled(text: str, results: Path = RESULTS) -> str:
    """The document with every marked table written anew. Raises KeyError for a name that TABLES does not have."""
    return BLOCK.sub(lambda m: f"{m[1]}{table(m['name'], results)}\n{m[3]}", text)


def table(name: str, results: Path = RESULTS) -> str:
    """One table as markdown."""
    return "\n".join(TABLES[name].lines(results))


# ------------------------------------------------------------------------------------------------------- what they show

most, least = partial(max, default=None), partial(min, default=None)


def single(title: str, key: str, digits: int = 2, best: Callable | None = None, unit: str = "") -> Column:
    """A column of one number a row."""
    return Column(title, ((key,),), digits, best, unit)


def edits(kind: str) -> Path_:
    return ("scores", kind)


RIVALS = {
    "prompt swap after DDIM": "prompt swapped after DDIM inversion",
    "negative-prompt inversion": "negative-prompt inversion",
    "null-text inversion": "null-text inversion",
    "DDIM + MasaCtrl": "DDIM inversion + MasaCtrl",
    "direct inversion + MasaCtrl": "direct inversion + MasaCtrl",
    "direct inversion + plug-and-play": "direct inversion + plug-and-play",
    "direct + plug-and-play, tuned here": "the same, attention only",
    "DDIM + Prompt-to-Prompt": "DDIM inversion + Prompt-to-Prompt",
    "direct inversion + Prompt-to-Prompt": "direct inversion + Prompt-to-Prompt",
    "InstructPix2Pix": "InstructPix2Pix, told what to do",
    "KV Inversion": "KV Inversion, as the nodes stand",
    "KV Inversion, recorded only": "recorded only",
    "KV Inversion, source guidance 1": "the same, *source_guidance* 1",
    "KV Inversion, source guidance 1, recorded only": "recorded only, *source_guidance* 1",
    "KV Inversion, source mask": "the same, *source_mask* on the animal",
    "KV Inversion, source mask, recorded only": "recorded only, *source_mask* on the animal",
    "KV Inversion, frozen": "mode *frozen*",
    "KV Inversion, recompute": "mode *recompute*",
    "ideal edit through the autoencoder": BEYOND,
}
REGIONS = {
    "prompt only": "prompt only",
    "host: Conditioning (Set Mask)": "host: Conditioning (Set Mask)",
    "host: Set Latent Noise Mask": "host: Set Latent Noise Mask",
    "Cross-Attention Mask": "Cross-Attention Mask",
    "Feature Blend": "Feature Blend",
    "Feature Blend, PFB-Diff": "the same, preset *PFB-Diff*",
    "Feature Blend, paper": "the same, preset *paper*",
    "Cross-Attention Mask + Feature Blend": "both",
    "ideal edit through the autoencoder": BEYOND,
}


FLOW_RIVALS = {
    "prompt swap after Uni-Inv": "prompt swapped after Uni-Inv",
    "prompt swap after FireFlow": "prompt swapped after FireFlow",
    "prompt swap after Euler": "prompt swapped after Euler",
    "FlowEdit": "FlowEdit, as the node stands",
    "FlowEdit, start_percent 0.14": "FlowEdit, *start_percent* 0.14",
    "FlowEdit, source guidance 1, start_percent 0.14": "the same and *source_guidance* 1",
    "KV Inversion, recorded": "KV Inversion, recorded only",
    "KV Inversion, recorded, source guidance 3": "recorded only, *source_guidance* 3",
    "KV Inversion, recorded, source guidance 1": "recorded only, *source_guidance* 1",
    "KV Inversion, recorded, source mask": "recorded only, *source_mask* on the animal",
    "KV Inversion, recorded, frozen": "recorded only, mode *frozen*",
    "KV Inversion, learned": "learned, *rank* 16",
    "KV Inversion, learned, recompute": "learned, mode *recompute*",
    "ideal edit through the autoencoder": BEYOND,
}
FLOW_REGIONS = {
    "prompt only": "prompt only",
    "host: Conditioning (Set Mask)": "host: Conditioning (Set Mask)",
    "host: Set Latent Noise Mask": "host: Set Latent Noise Mask",
    "Cross-Attention Mask": "Cross-Attention Mask",
    "Cross-Attention Mask, hidden from text": "the same, *hide_from_text*",
    "Phrase in Region": "Phrase in Region",
    "Phrase in Region, prompt_inside 0": "the same, *prompt_inside* 0",
    "Feature Blend": "Feature Blend",
    "Cross-Attention Mask + Feature Blend": "Cross-Attention Mask + Feature Blend",
    "Phrase in Region + Feature Blend": "Phrase in Region + Feature Blend",
    "ideal edit through the autoencoder": BEYOND,
}
ONE_REGION = ("colour", "place")


def in_regions(
    title: str, key: str, digits: int = 2, best: Callable | None = None, kinds: tuple[str, ...] = ONE_REGION
) -> Column:
    """A number of edits by region, before Keep Outside."""
    return Column(title, tuple((kind, "before", key) for kind in kinds), digits, best)


def rivalled(source: str, rows: dict[str, str]) -> Table:
    """Ways of editing beside each other: what they reach, what they cost."""
    return Table(
        source,
        ("methods",),
        rows,
        (
            *(
                Column(title, ((*edits(title), "attribute"), (*edits(title), "identity")), 2)
                for title in ("pose", "colour", "place", "species")
            ),
            Column("once, passes", (("costs", "passes once"),), 0),
            Column("first edit, passes", (("costs", "passes first"),), 0),
            Column("each, passes", (("costs", "passes each"),), 0),
            Column("first edit, s", (("costs", "seconds first"),), 1),
            Column("kept", (("costs", "kept"),), 1, unit=" MB"),
        ),
        "method",
        bounds=("references",),
        incomplete=True,
    )


CLIP_EDITS = ("colour", "place", "species")


def in_clips(title: str, key: str, digits: int, best: Callable | None = None) -> Column:
    """A number of all edits of clips."""
    return Column(title, tuple((kind, key) for kind in CLIP_EDITS), digits, best)


def clip_likeness(kind: str) -> Column:
    """PSNR to the ideal edit and its deviation over clips."""
    return Column(f"{kind}, dB to the ideal edit", ((kind, "ideal"), (kind, "ideal +-")), 1, between=" ± ")


INSTRUCTIONS = {
    "raw instruction, no mask": "the instruction itself",
    "expressed, no mask": "what the language model made of it",
    "edit head, no mask": "the same by the edit head",
    "written by hand, no mask": "the result, written by hand",
    "raw instruction, both + Keep Outside": "the instruction itself, both + Keep Outside",
    "expressed, Cross-Attention Mask": "expressed, Cross-Attention Mask",
    "expressed, Feature Blend": "expressed, Feature Blend",
    "expressed, both": "expressed, both",
    "expressed, both + Keep Outside": "expressed, both + Keep Outside",
    "expressed, both, mask found by words": "expressed, both, mask by Find Words",
    "edit head, both + Keep Outside": "edit head, both + Keep Outside",
    "written by hand, both + Keep Outside": "by hand, both + Keep Outside",
    "prompt swap after DDIM": "expressed, prompt swapped after DDIM inversion",
    "KV Inversion, recorded only": "expressed, KV Inversion, recorded only",
    "ideal edit through the autoencoder": BEYOND,
}


def asked(title: str, key: str, digits: int = 2, best: Callable | None = None) -> Column:
    """A number of edits by plain and by vague instructions."""
    return Column(title, tuple((kind, key) for kind in ("plain", "vague")), digits, best)


POSED = (
    "prompt swapped", "KV Inversion, recorded", "the old action's words", "no action in words",
    "no action in words, source guidance 1", "frozen, learned", "recompute, learned",
)  # fmt: skip


def by_change(title: str, kind: str) -> Column:
    """What one kind of edit is worth under a setting of Apply KV."""
    return Column(title, tuple((kind, key) for key in ("attribute", "identity", "ideal")), (2, 2, 1), unit=" dB")


DRAWN = {
    "the drawings, through the autoencoder": "the drawings, through the autoencoder",
    "the same scenes without it, through the autoencoder": "the same scenes without it, through the autoencoder",
    "prompt": "no training, the style told in the prompt",
    "host": "the host's Train LoRA",
    "unet": "Train LoRA, U-Net only",
    "conv": "the same, *convolutions*",
    "offset": "*convolutions*, *noise_offset* 0.1",
    "dropped": "*convolutions*, *caption_dropout* 0.1",
    "picture": "*convolutions*, *loss_weight* picture, constant rate",
    "biases": "*convolutions*, *biases*, *loss_weight* picture, constant rate",
    "style": "preset *style*: *convolutions*, *biases*, *loss_weight* picture, *noise_offset* 0.1, constant rate",
    "debiased": "*convolutions*, *loss_weight* debiased, *noise_offset* 0.1, *alpha* 16, constant rate",
    "annealed": "the same, along a cosine",
    "words": "U-Net only, the style told in the captions",
    "snr": "U-Net only, *min_snr_gamma* 5",
    "rank4": "U-Net only, *rank* 4",
    "rank32": "U-Net only, *rank* 32",
    "both": "U-Net and text encoder",
}


def lora(concept: str, part: str = "") -> Table:
    """What a LoRA of a few pictures taught; part: which run, where a concept has several."""
    distance = single("distance", "distance")
    several = part.startswith("seeds")
    if several:
        distance = Column("distance", (("distance",), ("distance +-",)), between=" ± ")
    columns = tuple(single(name, name) for name in ("shown", "followed"))
    return Table(
        f"lora_{concept}{part and '_'}{part}.json",
        ("rows",),
        {name: DRAWN[name] for name in ("host", "biases", "style")} if several else DRAWN,
        (distance, *columns, single("by heart, dB", "heart", 1)),
        concept,
        incomplete=True,
    )


def with_spread(title: str, key: str, digits: int = 2, unit: str = "") -> Column:
    """A mean and its standard deviation over sets of scenes."""
    return Column(title, ((key,), ("spread", key)), digits, unit=unit, between=" ± ")


def poses(source: str) -> Table:
    """The edits of `bench kv`."""
    return Table(
        source,
        ("edits",),
        {
            "prompt swapped": "prompt swapped, same noise",
            "KV Inversion, defaults": "KV Inversion, as the nodes stand",
            "frozen": "mode *frozen*",
            "recompute (Algorithm 1)": "mode *recompute* (the paper's Algorithm 1)",
            "paper preset": "the paper's preset",
            "extend, no source guidance": "*extend* without source guidance",
            "source's K, V without tuning": "the source's keys and values without tuning",
            "ideal edit through the autoencoder": BEYOND,
        },
        (
            single("prompt followed", "followed"),
            single("pose", "pose"),
            single("identity", "identity", best=most),
            single("2nd colour", "second", best=most),
            single("collar", "collar", best=most),
            single("pattern", "pattern", best=most),
            single("facing", "facing", best=most),
            single("background", "background", 1, most, " dB"),
        ),
        "edit",
    )


TABLES = {
    "lora-ink": lora("ink"),
    "lora-ink-short": lora("ink", "short"),
    "lora-ink-seeds": lora("ink", "seeds"),
    "lora-ink-seeds-long": lora("ink", "seeds_long"),
    "lora-fox": lora("fox"),
    "lora-zigzag": lora("zigzag"),
    "pose-control": Table(
        "pose_control.json",
        ("rows",),
        {row + more: row + more for row in POSED for more in ("", " + skeleton")}
        | {"ideal edit through the autoencoder": BEYOND},
        (
            *(single(name, name) for name in ("pose", "facing", "identity", "pattern")),
            single("background", "background", 1, unit=" dB"),
            single("to the ideal", "ideal", 1, most, " dB"),
        ),
        "edit",
        incomplete=True,
    ),
    "kv-reconstruction": Table(
        "kv.json",
        ("reconstruction",),
        {
            "DDIM": "DDIM inversion alone",
            "tuned": "tuned",
            "autoencoder alone": "the autoencoder by itself (nothing can be better)",
        },
        (Column("PSNR to the source", ((),), 2, unit=" dB"),),
        "reconstruction at the editing guidance",
    ),
    "kv-presets": Table(
        "kv_paper.json",
        (),
        {
            "paper, Algorithm 1": "*paper, Algorithm 1* (inverted at 7.5)",
            "paper, equation 4 as printed": "*paper, equation 4 as printed* (inverted at 1)",
        },
        (
            single("DDIM alone at 7.5", "DDIM alone at 7.5", unit=" dB"),
            single("rebuilt", "rebuilt", unit=" dB"),
            single("sampled at 7.5", "sampled at 7.5", best=most, unit=" dB"),
            single("sampled at 1", "sampled at 1", best=most, unit=" dB"),
            single("a picture", "seconds a picture", 0, unit=" s"),
        ),
        "preset",
    ),
    "what-changes": Table(
        "what_changes.json",
        (),
        {
            "source_guidance 1, start_percent 0.1": "*source_guidance* 1",
            "source_guidance 3, start_percent 0.1": "*source_guidance* 3",
            "source_guidance 10, start_percent 0.1": "*source_guidance* 10",
            "what_changes: place, drawn mask": "3, drawn mask of the animal",
            "what_changes: place, found mask": "3, found mask",
            "source_guidance 10, start_percent 0, drawn mask": "10 from the start, drawn mask",
            "source_guidance 10, start_percent 0, found mask": "10 from the start, found mask",
        },
        (
            by_change("action", "pose"),
            by_change("colour", "colour"),
            by_change("place", "place"),
            by_change("species", "species"),
        ),
        turned=True,
    ),
    "kv-edits": poses("kv.json"),
    "kv-edits-75": poses("kv_guidance_75.json"),
    "kv-figure-6": Table(
        "kv_figure_6.json",
        (),
        {f"from {start}": f"from {start}, decoder" for start in (0.1, 0.3, 0.5, 0.7, 0.9)}
        | {place: f"from 0.1, {place}" for place in ("all", "encoder", "middle")},
        tuple(
            Column(title, (("recompute", key), ("frozen", key)), digits, unit=unit)
            for title, key, digits, unit in (
                ("pose", "pose", 2, ""),
                ("identity", "identity", 2, ""),
                ("background", "background", 1, " dB"),
                ("to the ideal", "ideal", 1, " dB"),
            )
        ),
        "*recompute* / *frozen*",
        turned=True,
    ),
    "kv-learning": Table(
        "kv_learning.json",
        (),
        {
            "extend, recorded": "extend, recorded",
            "frozen, tuned": "frozen, tuned",
            "recompute, tuned": "recompute, tuned",
            "frozen, recorded as the push, 5": "frozen, the recorded only as the push, 5",
        },
        (
            with_spread("pose", "pose"),
            with_spread("identity", "identity"),
            with_spread("background", "background", 1, " dB"),
            with_spread("to the ideal", "ideal", 1, " dB"),
        ),
        "way",
    ),
    "rivals": rivalled("edits.json", RIVALS),
    "rivals-flux": rivalled("edits_flux.json", FLOW_RIVALS),
    "regions-flux": Table(
        "regions_flux.json",
        ("rows",),
        FLOW_REGIONS,
        (
            in_regions("edited", "attribute", kinds=(*ONE_REGION, "two")),
            in_regions("identity", "identity", best=most, kinds=(*ONE_REGION, "two")),
            in_regions("outside, dB", "outside", 1, most),
            in_regions("to the ideal edit, dB", "ideal", 1, most, (*ONE_REGION, "two")),
            in_regions("leakage", "leakage", best=least),
            in_regions("passes", "passes", 0, kinds=("colour",)),
        ),
        "method",
        incomplete=True,
    ),
    "regions": Table(
        "regions.json",
        ("rows",),
        REGIONS,
        (
            in_regions("edited", "attribute"),
            in_regions("identity", "identity", best=most),
            in_regions("outside, dB", "outside", 1, most),
            in_regions("to the ideal edit, dB", "ideal", 1, most),
            in_regions("leakage", "leakage", best=least),
            Column("passes", (("colour", "before", "passes"),), 0),
        ),
        "method",
    ),
    "instruction-reading": Table(
        "instruction.json",
        ("reading",),
        {"plain": "plain", "vague": "vague"},
        (
            single("texts", "texts", 0),
            single("exactly right", "exact"),
            *(single(name, name) for name in ("species", "colour", "pose", "side", "place")),
        ),
        "instructions",
    ),
    "instruction": Table(
        "instruction.json",
        ("rows",),
        INSTRUCTIONS,
        (
            asked("all right", "right", best=most),
            asked("edited", "edited", best=most),
            asked("identity", "identity", best=most),
            asked("to the ideal edit, dB", "ideal", 1, most),
            asked("outside, dB", "outside", 1, most),
            asked("leakage", "leakage", best=least),
        ),
        "plain / vague instructions",
        incomplete=True,
    ),
    "pairs": Table(
        "pairs.json",
        ("edits", "colour", "rows"),
        {
            "prompt alone": "prompt alone",
            "alpha 0.5": "alpha 0.5, the paper's",
            "alphas learned from pairs": "alphas learned from pairs",
        },
        (
            single("edited", "attribute", best=most),
            single("identity", "identity", best=most),
            single("background", "background", 1, most, " dB"),
            single("to the ideal edit", "ideal", 1, most, " dB"),
            single("nearer than alpha 0.5", "wins"),
        ),
        "a new colour",
    ),
    "clips": Table(
        "context_clips.json",
        ("clips",),
        {
            "per frame": "every frame by itself",
            "Tune-A-Video style": "Tune-A-Video style",
            "FateZero style": "FateZero style",
            "+ Video Attention": "every frame by itself + Video Attention",
            "+ Attention Fusion": "+ Attention Fusion",
            "+ context adapter": "+ context adapter",
            "per frame, context adapter alone": "every frame by itself, context adapter",
            "ideal edit through the autoencoder": BEYOND,
        },
        (
            in_clips("prompt followed", "followed", 2, most),
            in_clips("CLIP-temp, all pairs", "pairs", 3, most),
            in_clips("flicker", "flicker", 3, least),
            *map(clip_likeness, CLIP_EDITS),
            Column("background of a new colour, dB", (("colour", "background"),), 1, most),
        ),
        " / ".join(CLIP_EDITS),
        turned=True,
    ),
    "context-pictures": Table(
        "context_pictures.json",
        ("pictures", "rows"),
        {
            f"{sampler}, guidance {guidance}": f"{label}, {guidance}"
            for guidance in ("1.5", "3", "5", "9")
            for sampler, label in {
                "plain DDIM": "plain DDIM",
                "context-aware, x0_hat": "context-aware, *x0_hat*",
                "context-aware, x0": "context-aware, *x0*",
            }.items()
        }
        | {"drawn pictures through the autoencoder": "the drawn pictures, through the autoencoder"},
        (
            single("all right", "all", 3),
            single("attributes", "mean", 3),
            single("distance", "distance", 3),
        ),
        "sampler, guidance",
        incomplete=True,
    ),
    "context-kinds": Table(
        "context_kinds.json",
        ("kinds", "rows"),
        {
            f"{kind}, guidance {guidance}": f"{label}, {guidance}"
            for guidance in ("1.5", "3")
            for kind, label in {
                "plain DDIM": "plain DDIM",
                "sees the latent": "sees the latent (default)",
                "as printed, CLIP of x0_hat": "as printed: CLIP of *x0_hat*",
                "as printed, with a LoRA on all attention": "as printed, with a LoRA on q, all attention",
                "a LoRA on all attention, sees the latent": "sees the latent, with a LoRA on q, all attention",
                "released code, with a LoRA on to_q": "released code, with a LoRA on q",
                "reads the class": "reads the class",
                "reads the layout": "reads the layout",
                "reads the layout, CLIP of x0_hat": "reads the layout, CLIP of *x0_hat*",
            }.items()
        },
        (
            single("all right", "all", 3),
            single("attributes", "mean", 3),
            single("layout overlap", "overlap", 3),
            single("distance", "distance", 3),
            single("training, s of a core", "seconds", 0),
        ),
        "adapter, guidance",
    ),
    "context-convergence": Table(
        "context_convergence.json",
        ("convergence",),
        {
            f"{way}, {steps} steps": f"{steps} steps, {label}"
            for steps in ("5", "10", "20", "40")
            for way, label in {"queries": "queries alone", "queries + context adapter": "and the adapter"}.items()
        },
        (
            Column("dB to the ideal edit", (("ideal",), ("ideal +-",)), 2, between=" ± "),
            single("CLIP-temp, all pairs", "pairs", 3),
        ),
        "tuned for",
    ),
    "multimodal": Table(
        "multimodal.json",
        ("rows",),
        {
            "words alone, the pocket model as it is": "words alone, colour told",
            "words alone, trained": "words alone, colour told, trained encoder",
            "picture as one pooled vector": "the picture as one pooled vector",
            "16 tokens a picture": "the picture as 16 tokens",
            "64 tokens a picture": "the picture as 64 tokens",
            "256 tokens a picture": "the picture as 256 tokens",
            "two pictures, 64 tokens each": "two pictures, the second for the place",
            "the drawn answer through the autoencoder": "the drawn answer, through the autoencoder",
        },
        (
            single("words followed", "words"),
            single("coat's colour", "colour"),
            single("identity", "identity"),
            single("collar", "collar"),
            single("tokens", "tokens", 0),
        ),
        "prompt",
    ),
    "multimodal-ink": Table(
        "multimodal_findings_ink.json",
        ("rows",),
        {
            "4: fine-tune alone, colour told": "the fine-tune alone, colour told",
            "4: MUMU alone": "MUMU alone",
            "4: MUMU merged into the fine-tune": "MUMU merged into the fine-tune",
            "4: the answers, through the autoencoder": "the drawn answers, through the autoencoder",
            "4: the answers in ink, through the autoencoder": "the answers in ink, through the autoencoder",
        },
        (
            single("ink", "ink", 1),
            single("shown", "shown"),
            single("species", "species"),
            single("coat's colour", "colour"),
            single("second colour", "second"),
            single("identity", "identity"),
        ),
        "model",
    ),
    "multimodal-rival": Table(
        "multimodal_rival.json",
        ("rows",),
        {
            "the picture as one pooled vector": "the picture as one pooled vector, among the words",
            "beside the words, strength 1": "four tokens of it beside the words, strength 1",
            "beside the words, strength 0.6": "the same, strength 0.6",
        },
        (
            single("words followed", "words"),
            single("coat's colour", "colour"),
            single("identity", "identity"),
            single("second colour", "second"),
            single("collar", "collar"),
            single("facing", "facing"),
        ),
        "prompt",
    ),
    "text": Table(
        "text_control.json",
        ("rows",),
        {
            "prompt only": "the prompt alone, the text in words",
            "embeddings alone": "embeddings without control",
            "control alone": "control without embeddings",
            "both": "both",
            "pasted text through the autoencoder": "the drawn answer, through the autoencoder",
            "host: prompt, noise in the place": "changed: the prompt alone, noise in the place (host)",
            "both, changed in a picture": "changed: both, all drawn anew",
            "both, changed, keep_rest": "changed: both, *keep_rest*",
        },
        (
            single("exact", "exact"),
            single("NED", "ned"),
            single("exact, PP-OCRv5", "exact_second"),
            single("exact anywhere", "exact_anywhere"),
            single("place", "place"),
            single("rest", "rest"),
            single("outside", "outside", 1, unit=" dB"),
        ),
        "sign",
        incomplete=True,
    ),
    "text-style": Table(
        "text_lora.json",
        ("rows",),
        {
            "both": "both, no LoRA",
            "both + ink LoRA, CLIP 1": "both, ink LoRA with CLIP strength 1",
            "both + ink LoRA, CLIP 0": "both, ink LoRA with CLIP strength 0",
            "pasted text in ink through the autoencoder": "the drawn answer in ink, through the autoencoder",
        },
        (
            single("exact", "exact"),
            single("NED", "ned"),
            single("exact, PP-OCRv5", "exact_second"),
            single("place", "place"),
            single("rest", "rest"),
            single("ink", "ink"),
            single("distance", "distance"),
        ),
        "sign",
        incomplete=True,
    ),
    "small-rank": Table(
        "kv_rank.json",
        (),
        {"0": "in full", "8": "*rank* 8", "4": "*rank* 4", "2": "*rank* 2"},
        (
            single("file", "MB", 1, unit=" MB"),
            single("rebuilt", "reconstruction", unit=" dB"),
            single("identity", "identity"),
        ),
    ),
    "small-keyframes": Table(
        "kv_keyframes.json",
        (),
        {"2": "*keyframes* 2", "3": "*keyframes* 3"},
        (
            single("file", "MB", 1, unit=" MB"),
            single("rebuilt", "reconstruction", unit=" dB"),
            single("identity", "identity"),
        ),
    ),
}
