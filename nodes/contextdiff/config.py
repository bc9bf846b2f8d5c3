"""What a context adapter is: its kind, what it was built for, its size."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LATENT, CLIP_PREDICTED, CLIP_SOURCE, RELEASED = "latent", "CLIP of x0_hat", "CLIP of source", "released code"
KINDS = (LATENT, CLIP_PREDICTED, CLIP_SOURCE, RELEASED)
CLIP_KINDS = (CLIP_PREDICTED, CLIP_SOURCE)
TEXT, CLASS, LAYOUT = READS = "text", "class", "layout"
SIZES = {"small": (256, 2), "medium": (384, 3), "large": (512, 4)}  # width, depth; large is nearest to the paper's CLIP
LIMITS = {"latent_channels": 256, "text_width": 16384, "width": 4096, "depth": 64, "heads": 64, "patch": 32}
LIMITS_BY_KIND = {"vision_width": 16384, "rows": 1024, "columns": 1024, "labels": 4096}  # 0: a kind has no use for it


def kind_of(context: Tensor) -> str:
    """Whether a map (B, labels, rows, columns) is a class's or a layout's."""
    return CLASS if tuple(context.shape[-2:]) == (1, 1) else LAYOUT


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is built for and how large it is. Raises ValueError for sizes that cannot be built.

    latent_format: the host's name of the latent space ("SD15", "SDXL", ...). text_width: channels of a prompt's token
    (768 for SD 1.5, 2048 for SDXL). patch: latent pixels along a token's side. video: a batch is the frames of one
    clip. timestep: r depends on the noise level; without, one evaluation serves both levels of a step.

    kind: what r_phi sees, one of KINDS. vision_width: channels of CLIP's image tokens, for the kinds that see through
    CLIP. rows, columns: the latent that the released code's kind writes. reads: what it is told, one of READS; labels:
    of classes, or parts of a layout.
    """

    latent_format: str
    latent_channels: int
    text_width: int
    width: int = 256
    depth: int = 2
    heads: int = 8
    patch: int = 2
    video: bool = False
    timestep: bool = True
    kind: str = LATENT
    vision_width: int = 0
    rows: int = 0
    columns: int = 0
    reads: str = TEXT
    labels: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a context adapter's kind is one of {', '.join(KINDS)}, it is {self.kind[:60]!r}.")
        if self.reads not in READS:
            raise ValueError(f"a context adapter reads one of {', '.join(READS)}, this one {self.reads[:60]!r}.")
        if self.kind == RELEASED and not self.reads_text:
            raise ValueError(
                f"the released code's adapter reads texts only, it is given a {self.reads}: choose another adapter."
            )
        released = self.kind == RELEASED
        needed = {"vision_width": self.through_clip, "rows": released, "columns": released}
        needed["labels"] = not self.reads_text
        least = dict.fromkeys(LIMITS, 1) | {name: int(need) for name, need in needed.items()}
        for name, limit in (LIMITS | LIMITS_BY_KIND).items():
            if not least[name] <= getattr(self, name) <= limit:
                raise ValueError(
                    f"a context adapter's {name} must be from {least[name]} to {limit}, it is {getattr(self, name)}."
                )
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"a context adapter's width must divide by 4 and by its {self.heads} heads, it is {self.width}."
            )

    @classmethod
    def for_model(cls, model: Any, text_width: int, size: str = "small", **changes: Any) -> AdapterConfig:
        """The config that fits a host MODEL and prompts of this width: a size of SIZES, patches that keep SDXL cheap.

        A latent of 64 x 64 (SD 1.5, 512 px) and one of 128 x 128 (SDXL, 1024 px) both become 1024 tokens.
        """
        latent_format = model.get_model_object("latent_format")
        width, depth = SIZES[size]
        settings = {"width": width, "depth": depth, "patch": 4 if text_width > 1024 else 2} | changes
        return cls(type(latent_format).__name__, latent_format.latent_channels, text_width, **settings)

    @property
    def through_clip(self) -> bool:
        """Whether it sees pictures through CLIP's image encoder."""
        return self.kind in CLIP_KINDS

    @property
    def reads_text(self) -> bool:
        """Whether it reads a prompt's tokens."""
        return self.reads == TEXT

    def header(self) -> dict[str, Any]:
        """The fields for a file; those of later kinds only where they are used, so that earlier readers know them."""
        usual = {field.name: field.default for field in fields(self)}
        later = {"kind", "reads", *LIMITS_BY_KIND}
        return {k: v for k, v in asdict(self).items() if k not in later or v != usual[k]}

    def refuse_told(self, told: Any) -> None:
        """Raise ValueError for a prompt (B, L, D) or a map (B, labels, rows, columns) of another kind or width."""
        if self.reads_text:
            self.refuse_text(told.shape[-1])
        else:
            self.refuse_condition(kind_of(told), told.shape[1])

    def refuse_condition(self, reads: str, labels: int) -> None:
        """Raise ValueError for a class or layout of another kind or number of labels."""
        if (reads, labels) != (self.reads, self.labels):
            raise ValueError(
                f"the context adapter reads a {self.reads} of {self.labels} labels, the prompt carries a {reads} of "
                f"{labels}: give Class or Layout Context the values of the training."
            )

    def refuse_text(self, width: int) -> None:
        """Raise ValueError for prompts of another width."""
        if width != self.text_width:
            raise ValueError(
                f"the context adapter was trained with prompts of {self.text_width} channels, this prompt has {width}: "
                "connect the CLIP of the model family it was trained with."
            )

    def refuse_vision(self, width: int) -> None:
        """Raise ValueError for an image encoder of another width."""
        if width != self.vision_width:
            raise ValueError(
                f"the context adapter was trained with an image encoder of {self.vision_width} channels, the connected "
                f"clip_vision has {width}: connect the one that it was trained with."
            )
