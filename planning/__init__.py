"""Rehearsal of a run before it starts: one optimizer step on tensors without data, and what follows from it."""
