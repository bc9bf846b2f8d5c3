"""Datasets of interleaved prompts: what is in one, how it is built, read and looked at."""

from .building import build_dataset, describe_dataset
from .contact_sheet import overview
from .dataset import STAGES, Crop, Dataset, Recipe, Record, Stage
from .finders import ByBox, ByDetector, ByMask, Found
from .folder import read_dataset
from .pictures import read_picture

__all__ = [
    "STAGES",
    "ByBox",
    "ByDetector",
    "ByMask",
    "Crop",
    "Dataset",
    "Found",
    "Recipe",
    "Record",
    "Stage",
    "build_dataset",
    "describe_dataset",
    "overview",
    "read_dataset",
    "read_picture",
]
