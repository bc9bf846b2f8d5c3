"""Adapters: what the host calls while it samples. They read the host's dicts and hand plain tensors to kernels/."""
