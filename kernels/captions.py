"""Captions of a training, reduced to what is in the picture.

What a caption names is tied to its words, what it leaves out becomes a part of the LoRA. The labelling finding of the
review paper (section 3): "only annotate the corresponding items in the pictures rather than the layout related to the
painting style", so that text encoder and U-Net do not both learn the style.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from .scripts import COMMAS, UNSPACED

MEDIA = (
    "photo", "photograph", "photography", "snapshot", "picture", "image", "painting", "drawing", "sketch",
    "illustration", "artwork", "print", "render", "rendering", "engraving", "woodcut", "lithograph", "etching",
    "watercolor", "watercolour", "cartoon", "comic",
)  # fmt: skip
VIEWS = ("portrait", "close-up", "close up", "closeup", "shot", "view")
STYLE = (
    *MEDIA, "oil painting", "oil on canvas", "ink painting", "ink on paper", "ink on silk", "ink wash", "ink",
    "brush strokes", "brushstrokes", "brushwork", "pencil", "charcoal", "pastel", "gouache", "acrylic", "line art",
    "lineart", "pixel art", "vector art",
    "concept art", "digital art", "matte painting", "3d render", "cgi", "anime", "manga", "art", "style", "styled",
    "stylized", "stylised", "monochrome", "monochromatic", "black and white", "sepia", "grayscale", "greyscale",
    "impressionism", "impressionist", "expressionism", "expressionist", "cubism", "surrealism", "surrealist", "realism",
    "realistic", "photorealistic", "hyperrealistic", "minimalism", "minimalist", "abstract", "ukiyo-e", "sumi-e",
    "art nouveau", "art deco", "highly detailed", "detailed", "intricate", "masterpiece", "best quality",
    "high quality", "high resolution", "4k", "8k", "hd", "hdr", "uhd", "artstation", "deviantart", "behance",
    "pinterest", "trending on", "trending", "award winning", "award-winning", "cinematic", "cinematic lighting",
    "bokeh", "sharp focus", "soft focus", "film grain", "grainy", "wallpaper", "texture", "aesthetic",
)  # fmt: skip
LAYOUT = (
    *VIEWS, "wide shot", "full shot", "full body", "full-body", "medium shot", "centered", "centred", "cropped",
    "symmetrical", "symmetry", "composition", "framed", "border", "foreground", "background", "white background",
    "plain background", "simple background", "blurred background", "blurry background", "negative space", "side view",
    "front view", "rear view", "top view", "top-down", "aerial view", "low angle", "high angle", "wide angle",
    "depth of field", "perspective", "vertical", "horizontal", "square format",
)  # fmt: skip
SMALL = (  # words that say nothing alone
    "a", "an", "the", "of", "in", "on", "at", "to", "with", "and", "or", "by", "for", "from", "is", "are", "it", "its",
    "this", "that", "very", "some", "as", "into",
)  # fmt: skip
PLACED = (
    r"\b(?:in|on|at|to|near|towards)\s+the\s+(?:far\s+)?(?:foreground|background|middle\s+ground|distance|left|right|"
    r"center|centre|middle|top|bottom|upper|lower|edge|corner)(?:[\s-]+(?:left|right|half|third|side|edge|corner|part|"
    r"center|centre))*(?:\s+of\s+the\s+(?:picture|image|photo|photograph|painting|frame|scene|composition|canvas))?\b"
)
MADE_BY = (
    r"\b(?:in\s+(?:the|a|an)\s+(?:[\w-]+\s+){0,3}?style(?:\s+of\b.*)?|in\s+(?:the\s+)?style\s+of\b.*|(?:art\s+|"
    r"artwork\s+)?by\s+(?:the\s+)?artist\b.*|inspired\s+by\b.*|(?-i:by\s+[A-Z][\w.'-]+(?:\s+[A-Z][\w.'-]+)*))"
)
BETWEEN = re.compile(rf"\s*(?:[{COMMAS};\uff1b|\n]|\.(?:\s|$)|\u3002)\s*")


def any_of(words: Iterable[str]) -> str:
    """A pattern of any of some words or phrases, whole, the longest first; a final s is let through.

    Words of scripts that put no blanks between words are found wherever their letters stand.
    """
    longest = sorted({" ".join(word.lower().split()) for word in words if word.strip()}, key=len, reverse=True)
    return "(?:" + "|".join(map(whole, longest)) + ")"


def whole(word: str) -> str:
    """A pattern of one word or phrase, ended where its script ends words."""
    begins = "" if UNSPACED.match(word[0]) else r"\b"
    ends = "" if UNSPACED.match(word[-1]) else r"s?(?!\w)"
    return begins + re.escape(word).replace(r"\ ", r"\s+") + ends


@dataclass(frozen=True)
class Vocabulary:
    """What is left out of captions: phrases of style and layout, and `more`, but none of `kept`."""

    more: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()

    def words(self) -> set[str]:
        """Everything that is left out."""
        return {*STYLE, *LAYOUT, *self.more} - self.kept


@dataclass
class Reduced:
    """A caption of content alone, and what was taken out of it, in order."""

    text: str
    dropped: list[str] = field(default_factory=list)


@lru_cache(maxsize=8)
def patterns(vocabulary: Vocabulary) -> tuple[re.Pattern, re.Pattern, re.Pattern | None]:
    """(how a caption begins that says what kind of picture it is; ways to say where or by whom; the words)."""
    words = vocabulary.words()
    media = [word for word in (*MEDIA, *VIEWS) if word in words]
    frame = rf"^(?:this\s+is\s+)?(?:(?:a|an|the)\s+)?(?:[\w-]+\s+){{0,4}}?{any_of(media)}\s+(?:of|showing|depicting)\s+"
    opening = re.compile(frame if media else r"(?!)", re.I)
    return opening, re.compile(f"{PLACED}|{MADE_BY}", re.I), re.compile(any_of(words), re.I) if words else None


def reduce(caption: str, vocabulary: Vocabulary = Vocabulary()) -> Reduced:
    """A caption without its words of style and layout.

    "a painting of" and its like at the beginning goes, and so does where in the picture a thing is, and "by Wang Hui".
    Of the phrases between commas behind the first, one that keeps a single word of content at most is left out whole;
    of the others only the words of the vocabulary. A caption without any comes back as it is.
    """
    found = Reduced("")
    parts = [
        reduced_part(part, vocabulary, found, least=2 if n else 1) for n, part in enumerate(BETWEEN.split(caption))
    ]
    kept = [part for part in parts if part]
    found.text = ", ".join(dict.fromkeys(kept)) if found.dropped else caption.strip()
    return found


def reduced_part(part: str, vocabulary: Vocabulary, found: Reduced, least: int) -> str:
    """One phrase of a caption, reduced, empty with fewer words of content than `least`; what goes goes to `found`."""
    opening, ways, words = patterns(vocabulary)
    before = len(found.dropped)

    def gone(match: re.Match) -> str:
        found.dropped.append(" ".join(match.group().split()))
        return " "

    text = ways.sub(gone, opening.sub(gone, part))
    if words and words.search(text):
        if len(content_of(words.sub(" ", text))) < least:
            found.dropped.append(" ".join(text.split()))
            return ""
        text = words.sub(gone, text)
    if len(found.dropped) == before:
        return " ".join(part.split())
    return trimmed(text)


def content_of(text: str) -> list[str]:
    """The words of a text that say something; the letters of those that stand without blanks."""
    return [word for word in re.findall(rf"{UNSPACED.pattern}|\w[\w'-]*", text) if word.lower() not in SMALL]


def trimmed(text: str) -> str:
    """A text from which words were taken: one space between words, and no loose "of the" at its end or "and" at its
    beginning."""
    words = text.split()
    while words and words[-1].lower().strip("-") in ("", *SMALL):
        words.pop()
    while words and words[0].lower() in {"of", "with", "and", "in", "on", "by", "or", "-"}:
        words.pop(0)
    return " ".join(words)


def with_trigger(caption: str, trigger: str) -> str:
    """A caption behind its trigger word, once."""
    trigger = " ".join(trigger.split())
    if not trigger or re.match(rf"{re.escape(trigger)}(?!\w)", caption, re.I):
        return caption
    return f"{trigger}, {caption}" if caption else trigger
