"""Vision-language models: kinds of them, how a folder is read, what they make of a prompt."""

from .families import FAMILIES, Family
from .loading import DTYPES, load_vlm, with_lora
from .spans import Span
from .vision_language import Hidden, VisionLanguage

__all__ = ["DTYPES", "FAMILIES", "Family", "Hidden", "Span", "VisionLanguage", "load_vlm", "with_lora"]
