"""DDIM inversion: a real picture becomes the noise that the model would turn back into it."""

from .measure import error_in_words, reconstruction_error

__all__ = ["error_in_words", "reconstruction_error"]
