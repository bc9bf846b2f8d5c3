"""Multimodal prompts: what other techniques may know of vision-language models and the folders they come in."""

from .encoder import MultimodalEncoder
from .interleaved import Picture
from .vlm import DTYPES, VisionLanguage
from .vlm.answering import Answer, answer, language_head
from .vlm.decoding import cache_of, decode
from .vlm.folders import configuration, name_of, read_tokenizer, refuse_code, weight_files
from .vlm.loading import hosted
from .vlm.reading import COPY_AGAIN, Measured, managed, reading

__all__ = [
    "COPY_AGAIN",
    "DTYPES",
    "Answer",
    "Measured",
    "MultimodalEncoder",
    "Picture",
    "VisionLanguage",
    "answer",
    "cache_of",
    "configuration",
    "decode",
    "hosted",
    "language_head",
    "managed",
    "name_of",
    "read_tokenizer",
    "reading",
    "refuse_code",
    "weight_files",
]
