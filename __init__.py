"""Palimpsest: edit real pictures inside the attention and features of the host's own diffusion models."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The host's entry point; the host is imported only here, so tests can load the pack without it."""
    from .nodes.extension import Palimpsest

    return Palimpsest()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
