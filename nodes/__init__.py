"""The nodes of the pack, one module per technique; extension.py lists them for the host."""
