"""Instructions: what other techniques may know of edit heads."""

from .edit_head import EditHead, Reading, head_of

__all__ = ["EditHead", "Reading", "head_of"]
