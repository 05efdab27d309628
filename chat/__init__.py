"""Conversations as text: how each Qwen family writes them, and which tokens are trained."""
