"""Text at a place in a picture: AnyText's ControlNet on the host's own, loaded, applied and trained."""
