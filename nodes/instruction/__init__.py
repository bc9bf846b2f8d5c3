"""Instructions: what other techniques may know of edit heads, and of the language models that they read."""

from .edit_head import EditHead, Reading, head_of
from .heads import HEADS, TrainedHead, from_content
from .heads import content as head_content
from .llava import MgieModel
from .rows import ImageRows
from .teaching import hear, own_rows
from .wording import QUESTION, asked, cleaned

__all__ = [
    "HEADS",
    "QUESTION",
    "EditHead",
    "ImageRows",
    "MgieModel",
    "Reading",
    "TrainedHead",
    "asked",
    "cleaned",
    "from_content",
    "head_content",
    "head_of",
    "hear",
    "own_rows",
]
