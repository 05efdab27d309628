"""Qwen v1 in Qwen2's layout, and back."""
