"""What trainings share. Techniques that train import this front, as `training`."""

from .factors import Factors, act_in, act_in_unet, added_by, linear_layers, unet_file, weighted_layers
from .fileset import Content, FileSet
from .finite import GoodWeights, NotANumber, nan_error, require_finite
from .history import History
from .loras import lora_shelf
from .network import LearnedNetwork
from .optimise import CLIP_NORM, WEIGHT_DECAY, adamw, clip_gradients, divide_gradients
from .prompts import one_prompt_per_picture
from .reading import ReadTokens, embedding_weights, loss_of
from .seeds import generator, generator_at
from .watch import Watch, kept_if_it_ends_early, nothing, previews

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
    "Watch",
    "act_in",
    "act_in_unet",
    "adamw",
    "added_by",
    "clip_gradients",
    "divide_gradients",
    "embedding_weights",
    "generator",
    "generator_at",
    "kept_if_it_ends_early",
    "linear_layers",
    "lora_shelf",
    "loss_of",
    "nan_error",
    "nothing",
    "one_prompt_per_picture",
    "previews",
    "require_finite",
    "unet_file",
    "weighted_layers",
]
