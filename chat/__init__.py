"""A conversation as text, and which part of it is trained; no torch, no model."""
