"""What Tune KV and Apply KV are told, and the paper's own values for both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from ..inversion import ALGORITHM_1, EQUATION_4
from ..settings import Settings

GUIDED, CONDITIONAL = "with guidance", "prompt only"
EVERYTHING, WEIGHTS = "embeddings and weights", "weights only"
PAPER = "paper"

# The source carries the identity and needs more: on the pocket model rank 4 with 16 keeps what rank 4 with 4 loses.
SOURCE_RANK = 4

LAYERS = {
    "decoder": ("output",),
    "encoder": ("input",),
    "middle": ("middle",),
    "all": ("input", "middle", "output"),
}

# arXiv:2309.16608, section 4: guidance 7.5, decoder; its optimiser is not printed, null-text inversion's takes its
# place. The edit uses the source after the first tenths of the steps (figure 6). Algorithm 1 tunes with guidance; eq. 4
# holds one conditional eps, so that the picture comes back at guidance 1 alone.
PAPER_TUNING = {
    "guidance": 7.5,
    "tune_with": CONDITIONAL,
    "layers": "decoder",
    "start_percent": 0.0,
    "inner_steps": 10,
    "learning_rate": 0.01,
    "tolerance": 1e-5,
    "warm_start": False,
    "end_percent": 1.0,
    "learn": EVERYTHING,
    "rank": 0,
    "keyframes": 1,
    "batch_steps": 1,
    "auto_layers": False,
}
PAPER_EDITING = {
    "mode": "recompute",
    "strength": 1.0,
    "source_guidance": 1.0,
    "start_percent": 0.4,
    "end_percent": 1.0,
    "layers": "all",
    "look_ahead": 0.0,
}
PRESET_TOOLTIP = (
    "as set below: the values under this line act. The others replace them by the paper's, see the help page: "
    "Algorithm 1 tunes at guidance 7.5 and rebuilds the picture there; equation 4 has no guidance and rebuilds it at "
    "guidance 1 only (paper: its older name). Take the same one in Invert Picture, Tune KV and Apply KV."
)


def chosen_layers(layers: list, choice: str) -> list:
    """The layers of a choice: decoder = output blocks, encoder = input blocks, middle, all (paper, section 4.2)."""
    return [layer for layer in layers if layer.block in LAYERS[choice]]


@dataclass(frozen=True)
class TuneSettings(Settings):
    """How psi_t is fitted at every step; see PalimpsestTuneKV for what each does to the picture."""

    PRESETS: ClassVar = {
        PAPER: PAPER_TUNING,
        ALGORITHM_1: PAPER_TUNING | {"tune_with": GUIDED},
        EQUATION_4: PAPER_TUNING,
    }

    guidance: float = 7.5
    tune_with: str = GUIDED
    layers: str = "decoder"
    start_percent: float = 0.0
    inner_steps: int = 10
    learning_rate: float = 0.01
    tolerance: float = 1e-5
    warm_start: bool = True
    keep_source: bool = True
    end_percent: float = 1.0
    learn: str = EVERYTHING
    rank: int = 0
    keyframes: int = 1
    batch_steps: int = 1
    auto_layers: bool = False

    @property
    def run_guidance(self) -> float:
        """The guidance at which the picture is rebuilt."""
        return self.guidance if self.tune_with == GUIDED else 1.0

    @property
    def weights_only(self) -> bool:
        """Whether K_hat, V_hat are the source's K, V and only lambda and gamma are learned."""
        return self.learn == WEIGHTS

    @property
    def needs_source(self) -> bool:
        """Whether what the source feeds to_k and to_v is stored."""
        return self.keep_source or self.weights_only

    @property
    def record_only(self) -> bool:
        """Whether nothing is learned: the source's keys and values are recorded, for mode extend."""
        return self.inner_steps == 0

    def recorded(self, steps: int) -> list[int]:
        """The steps at which the source is recorded: all of the span, or its keyframes."""
        return [group[-1] for group in replace(self, batch_steps=1).groups(*self.span(steps))]

    @property
    def source_rank(self) -> int:
        """Rank of the source's tokens: they carry the identity, which needs more than the corrections K_hat, V_hat."""
        return SOURCE_RANK * self.rank

    @property
    def folded(self) -> bool:
        """Whether gamma is stored multiplied into K_hat, V_hat: keyframes mix the two apart."""
        return self.keyframes == 1 and not self.weights_only

    def span(self, steps: int) -> tuple[int, int]:
        """The steps first <= t < last in which psi_t is learned and acts. Raises ValueError if there are none."""
        first, last = round(self.start_percent * steps), round(self.end_percent * steps)
        if first >= last:
            raise ValueError(
                f"start_percent {self.start_percent:g} and end_percent {self.end_percent:g} leave none of {steps} "
                "steps to learn: move them apart, or invert in more steps."
            )
        return first, last

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step: falls to one half, as null-text inversion's 1 - i/100 does over its 50 steps."""
        return self.learning_rate * (1.0 - 0.5 * step / steps)

    def converged(self, step: int) -> float:
        """Loss below which a step stops early: null-text inversion's 1e-5 + 2e-5 i, i = 0 at the noisiest step."""
        return self.tolerance * (1.0 + 2.0 * step)

    def groups(self, first: int, last: int) -> Iterator[range]:
        """Steps that are learned together: each by itself, `batch_steps` at a time, or up to the next keyframe."""
        if self.keyframes > 1:
            yield range(first, first + 1)
            first += 1
        size = max(self.keyframes, self.batch_steps if self.keyframes == 1 else 1)
        for start in range(first, last, size):
            yield range(start, min(start + size, last))


@dataclass(frozen=True)
class ApplySettings(Settings):
    """How an edit looks at the source; see PalimpsestApplyKV for what each does to the picture."""

    PRESETS: ClassVar = {PAPER: PAPER_EDITING, ALGORITHM_1: PAPER_EDITING, EQUATION_4: PAPER_EDITING}

    mode: str = "extend"
    strength: float = 1.0
    source_guidance: float = 3.0
    start_percent: float = 0.1
    end_percent: float = 1.0
    layers: str = "all"
    look_ahead: float = 0.0
