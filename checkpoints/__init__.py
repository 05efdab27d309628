"""Checkpoint folders, tensor by tensor, without building a model."""
