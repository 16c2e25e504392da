"""Tensors on disk: our checkpoints, files of others, and which network they are."""
