"""That the picture's tokens begin where a prompt's text ends: other nodes can put tokens of their own in front.

The host's door for it is the patch behind a transformer's input (`post_input`: USO Style Reference). Ours comes last
there, in the calls in which a technique has to know where tokens stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DOOR = "post_input"


@dataclass(frozen=True)
class TextFirst:
    """post_input patch: raises ValueError where the text has other tokens than the prompt gave it."""

    family: str
    tokens: int

    def __call__(self, args: dict) -> dict:
        found = args["txt"].shape[1]
        if found != self.tokens:
            raise ValueError(
                f"the text of a prompt has {self.tokens} tokens in {self.family}, and {found} stand in front of the "
                "picture: another node puts tokens in front of the text (USO Style Reference does), where neither "
                "words nor the picture would be found. Take that node out."
            )
        return args


def with_text_checked(options: dict, family: str, tokens: int) -> dict[str, Any]:
    """The host's patches of a call, ours last where others change a transformer's input."""
    patches: Mapping[str, list] = options.get("patches", {})
    if not patches.get(DOOR):
        return dict(patches)
    return {**patches, DOOR: [*patches[DOOR], TextFirst(family, tokens)]}
