"""What trainings share. Techniques that train import this front, as `training`."""

from .changes import ChangedWeight, Changes, NamedTensors, changes_act_in_unet
from .conditioning import one_prompt_per_picture
from .factors import (
    Factors,
    act_in,
    act_in_unet,
    added_by,
    linear_layers,
    unet_file,
    weighted_layers,
)
from .fileset import Content, FileSet
from .finite import GoodWeights, NotANumber, nan_error, require_finite
from .history import History
from .loras import lora_shelf
from .network import LearnedNetwork
from .optimise import CLIP_NORM, WEIGHT_DECAY, adamw, clip_gradients, divide_gradients
from .reading import (
    ReadTokens,
    embedding_weights,
    family_of,
    loss_of,
    own_resolution,
    placeholder,
    told_of_memory,
)
from .seeds import generator, generator_at
from .watch import Watch, kept_if_it_ends_early, nothing, previews, watched

__all__ = [
    "CLIP_NORM",
    "WEIGHT_DECAY",
    "ChangedWeight",
    "Changes",
    "Content",
    "Factors",
    "FileSet",
    "GoodWeights",
    "History",
    "LearnedNetwork",
    "NamedTensors",
    "NotANumber",
    "ReadTokens",
    "Watch",
    "act_in",
    "act_in_unet",
    "adamw",
    "added_by",
    "changes_act_in_unet",
    "clip_gradients",
    "divide_gradients",
    "embedding_weights",
    "family_of",
    "generator",
    "generator_at",
    "kept_if_it_ends_early",
    "linear_layers",
    "lora_shelf",
    "loss_of",
    "nan_error",
    "nothing",
    "one_prompt_per_picture",
    "own_resolution",
    "placeholder",
    "previews",
    "require_finite",
    "told_of_memory",
    "unet_file",
    "watched",
    "weighted_layers",
]
