"""Feature blending: what trainings that blend features beside may know of it."""

from .blend import Blending, Recording, sources_of
from .files import SHELF, content
from .layers import Feature, FeatureLayer, chosen, feature_layers
from .opponent import Opponent
from .patches import patch_features
from .weights import BlendWeights

__all__ = [
    "SHELF",
    "BlendWeights",
    "Blending",
    "Feature",
    "FeatureLayer",
    "Opponent",
    "Recording",
    "chosen",
    "content",
    "feature_layers",
    "patch_features",
    "sources_of",
]
