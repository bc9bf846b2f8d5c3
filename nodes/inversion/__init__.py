"""DDIM inversion: a real picture becomes the noise that the model would turn back into it."""

from .measure import error_in_words, reconstruction_error
from .presets import ALGORITHM_1, EQUATION_4

__all__ = ["ALGORITHM_1", "EQUATION_4", "error_in_words", "reconstruction_error"]
