"""Families of checkpoints: what a config means, which blocks it makes, what its tensors are called."""
