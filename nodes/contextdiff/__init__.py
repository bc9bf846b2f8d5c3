"""ContextDiff (arXiv:2402.16627): a small network that shifts the path between noise and picture."""

from .bias import noisiest
from .sampling import ContextSampling, SamplerSettings

__all__ = ["ContextSampling", "SamplerSettings", "noisiest"]
