"""The host's caches of steps (EasyCache, LazyCache), which answer for the network without running it.

A pass of the source has to reach the layers at every step, and must not become what such a cache measures the edit by.
"""

from __future__ import annotations

from typing import Any

CACHES = ("easycache", "lazycache")  # the host's keys for their wrappers


def every_step_runs(model_options: dict) -> dict:
    """Options of a model call in which no cache answers for the network."""
    options = model_options.get("transformer_options", {})
    kept = {
        kind: {key: given for key, given in named.items() if key not in CACHES}
        for kind, named in options.get("wrappers", {}).items()
    }
    return model_options | {"transformer_options": options | {"wrappers": kept}}


def take_caches_out(patched: Any) -> None:
    """Let no cache answer for the network of a clone."""
    for kind, named in list(patched.wrappers.items()):
        for key in CACHES:
            if key in named:
                patched.remove_wrappers_with_key(kind, key)
