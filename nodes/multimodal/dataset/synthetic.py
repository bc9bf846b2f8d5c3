"""Prompts of synthetic pictures: contents times styles (MUMU, section 4).

"Our prompts were composed of a content, e.g. 'a man and a dog hiking in the wilderness during the day,' concatenated
with a style, e.g. 'Abstract, geometric, modernist, Cubist influences, bold color blocks, Art Deco elements.' To
encourage the model to disentangle content and style, we paired each content with many different styles."
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from comfy_api.latest import io

from ... import host, inputs
from ...quoting import quoted
from ...settings import Settings
from .text import cleaned, lines

MARKED = re.compile(r"\[([^\[\]]*)\]")
MOST = 100_000  # prompts in one run
MOST_SEED = 1 << 63
STYLES = "a photo\nan oil painting\na pencil drawing\nclaymation"


@dataclass(frozen=True)
class PairSettings(Settings):
    """Which contents meet which styles; see PalimpsestSyntheticPrompts for each."""

    contents: str = ""
    styles: str = STYLES
    styles_each: int = 4
    most: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Pair:
    """A prompt, the words of it that are to be cut out of its picture, and the seed of its picture."""

    prompt: str
    words: tuple[str, ...]
    seed: int


def marked(content: str) -> tuple[str, tuple[str, ...]]:
    """A content without its brackets, and what stands in them: "a [man] hiking" -> ("a man hiking", ("man",)).

    Raises ValueError for brackets without words, and for one without its other.
    """
    words = tuple(" ".join(word.split()) for word in MARKED.findall(content))
    plain = " ".join(MARKED.sub(r"\1", content).split())
    if not all(words) or "[" in plain or "]" in plain:
        raise ValueError(
            f"contents has {quoted(content)}, whose brackets hold nothing or do not match: put what is to be cut out "
            "in brackets, a [man] and a [dog] hiking, or write none."
        )
    return plain, words


def pairs(settings: PairSettings) -> list[Pair]:
    """Every content with some of the styles, chosen by the seed; no pair comes twice. Raises ValueError for none.

    A content keeps its styles where other lines are added behind it; each pair has a seed of its own for its picture.
    """
    contents = [marked(line) for line in spoken(settings.contents)]
    styles = spoken(settings.styles) or [""]
    if not contents:
        raise ValueError("contents holds no line: write what the pictures should show, one to a line.")
    each = min(settings.styles_each or len(styles), len(styles))
    if len(contents) * each > MOST:
        raise ValueError(
            f"{len(contents)} contents with {each} styles each are {len(contents) * each} prompts, at most {MOST} are "
            "made in one run: fewer styles_each, or fewer lines."
        )
    found = [
        Pair(joined(content, styles[style]), words, seed_of(settings.seed, number, style))
        for number, (content, words) in enumerate(contents)
        for style in chosen(len(styles), each, seed_of(settings.seed, number))
    ]
    if settings.most and settings.most < len(found):
        found = [found[i] for i in chosen(len(found), settings.most, seed_of(settings.seed))]
    return found


def spoken(text: str) -> list[str]:
    """The lines of a text that are no comments, each once."""
    return list(dict.fromkeys(line for line in lines(cleaned(text)) if not line.startswith("#")))


def joined(content: str, style: str) -> str:
    """A content and a style behind it, with a comma between them."""
    return f"{content.rstrip(' ,.;')}, {style}" if style else content


def chosen(count: int, some: int, seed: int) -> list[int]:
    """`some` of the first `count` numbers, each at most once, in their order."""
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:some].tolist())


def seed_of(*numbers: int) -> int:
    """A seed that follows from numbers in their order."""
    found = 0
    for number in numbers:
        generator = torch.Generator().manual_seed((found * 1_000_003 + number) % MOST_SEED)
        found = int(torch.randint(MOST_SEED - 1, (), generator=generator))
    return found


def describe_pairs(found: Sequence[Pair], settings: PairSettings) -> str:
    """How many prompts there are, of how many contents and styles, and one of them."""
    contents, styles = len(spoken(settings.contents)), len(spoken(settings.styles))
    cut = sum(bool(pair.words) for pair in found)
    return (
        f"{len(found)} prompts of {contents} contents and {styles} styles; {cut} say what is to be cut out; the first: "
        f"{quoted(found[0].prompt)}"
    )


class SyntheticPrompts(io.ComfyNode):
    """Contents times styles, as MUMU prompts its checkpoint for pictures to train on (arXiv:2406.18790, section 4)."""

    @classmethod
    @inputs.completed("contents")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestSyntheticPrompts",
            display_name="Synthetic Prompts",
            category="palimpsest/multimodal",
            description="Pairs what pictures show with how they look, as a list of prompts: nodes behind it draw a "
            "picture for each with your own checkpoint, and Build Multimodal Dataset cuts them up. Each content comes "
            "in several styles, so that a trained encoder tells one from the other.",
            search_aliases=["mumu", "synthetic data", "content style", "prompt matrix", "prompt combinations"],
            inputs=[
                io.String.Input(
                    "contents",
                    multiline=True,
                    default="a [man] reading a book on a bench in the park",
                    tooltip="What the pictures show, one to a line, what is to be cut out in brackets: a [man] and a "
                    "[dog] hiking in the wilderness. Without brackets a detector takes all that it finds. # begins "
                    "a comment.",
                ),
                io.String.Input(
                    "styles",
                    multiline=True,
                    default=STYLES,
                    tooltip="How they look, one to a line; each is put behind a content, with a comma. Empty: the "
                    "contents alone.",
                ),
                io.Int.Input(
                    "styles_each",
                    default=4,
                    min=0,
                    max=10000,
                    tooltip="How many of the styles each content comes in, chosen by the seed. 0: all of them. The "
                    "more, the better a content is told from its style; the paper says many.",
                ),
                io.Int.Input(
                    "most",
                    default=0,
                    min=0,
                    max=100000,
                    advanced=True,
                    tooltip="At most so many prompts, chosen by the seed of all there are. 0 (default): all. A few do "
                    "for a try.",
                ),
                inputs.seed(
                    "Chooses the styles of each content, and the seed of each picture. Another seed gives other "
                    "pictures of the same lines.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="prompts",
                    is_output_list=True,
                    tooltip="A list of prompts, for CLIP Text Encode, and as captions for Build Multimodal Dataset.",
                ),
                io.String.Output(
                    display_name="words",
                    is_output_list=True,
                    tooltip="What is to be cut out of each picture, for words of Build Multimodal Dataset or of Select "
                    "Words.",
                ),
                io.Int.Output(
                    display_name="seeds",
                    is_output_list=True,
                    tooltip="A seed for each picture, for the sampler.",
                ),
                io.String.Output(display_name="report", tooltip="How many prompts there are, of how many lines."),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, **chosen) -> io.NodeOutput:
        settings = PairSettings.of(chosen)
        found = pairs(settings)
        report = describe_pairs(found, settings)
        lists = ([pair.prompt for pair in found], [", ".join(pair.words) for pair in found], [p.seed for p in found])
        return io.NodeOutput(*lists, report, ui=host.told(cls, report))
