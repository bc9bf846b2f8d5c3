"""Training a model to follow instructions: from triples of picture, instruction and result."""
