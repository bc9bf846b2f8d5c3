"""What trainings share. Techniques that train import this front, as `training`."""

from .conditioning import one_prompt_per_picture
from .factors import (
    Factors,
    Shifts,
    act_in,
    act_in_unet,
    added_by,
    linear_layers,
    shift_unet,
    unet_file,
    vectors,
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
    "Content",
    "Factors",
    "FileSet",
    "GoodWeights",
    "History",
    "LearnedNetwork",
    "NotANumber",
    "ReadTokens",
    "Shifts",
    "Watch",
    "act_in",
    "act_in_unet",
    "adamw",
    "added_by",
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
    "shift_unet",
    "told_of_memory",
    "unet_file",
    "vectors",
    "watched",
    "weighted_layers",
]
