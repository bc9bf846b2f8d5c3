"""KV Inversion (arXiv:2309.16608)."""
