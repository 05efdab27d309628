"""Optimizers whose parameters have a training form and an evaluation form, such as the schedule-free ones.

Such an optimizer has the methods ``train`` and ``eval``, which convert the parameters in place. Results and evaluations
need the evaluation form, and a resumed run the training form.
"""

from __future__ import annotations

from typing import Any


def has_forms(optimizer: Any) -> bool:
    """Return whether an optimizer, or the one that it wraps, has a training and an evaluation form."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has the methods always
    return all(callable(getattr(inner, name, None)) for name in ("train", "eval"))


def set_form(optimizer: Any, training: bool) -> None:
    """Convert the parameters of an optimizer that has forms; nothing happens if they are in that form already."""
    if has_forms(optimizer):
        if training:
            optimizer.train()
        else:
            optimizer.eval()
