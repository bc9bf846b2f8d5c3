"""Captions of pictures that something is learned from. Nothing in here is for other techniques."""
