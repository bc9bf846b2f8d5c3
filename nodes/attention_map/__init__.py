"""Attention maps: where in a picture the words of its prompt act. Nothing in here is for other techniques."""
