"""The maths of the pack: tensors in, tensors out. Nothing here knows the host."""
