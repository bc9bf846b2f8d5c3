"""Feature blending: what trainings that blend features beside may know of it."""

from .blend import Blending, Recording, sources_of
from .files import SHELF, content
from .layers import Feature, FeatureLayer, chosen, feature_layers
from .patches import patch_features
from .weights import BlendWeights

__all__ = [
    "SHELF",
    "BlendWeights",
    "Blending",
    "Feature",
    "FeatureLayer",
    "Recording",
    "chosen",
    "content",
    "feature_layers",
    "patch_features",
    "sources_of",
]
