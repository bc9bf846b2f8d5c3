"""Where chance comes from: generators on the CPU, so that every device draws the same."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def generator(seed: int) -> torch.Generator:
    """A generator for one stream of draws; any whole number will do."""
    return torch.Generator().manual_seed(seed % (1 << 64))


def generator_at(*place: Any) -> torch.Generator:
    """A generator for this very place of a training (seed, purpose, step, row), whatever was drawn elsewhere before."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
