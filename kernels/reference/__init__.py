"""Plain PyTorch, one function per equation. This package defines what is correct."""
