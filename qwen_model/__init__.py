"""Qwen v1 on current transformers, and the one ChatML renderer of the project."""
