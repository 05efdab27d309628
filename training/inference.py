"""A model as it is used: base, or base and adapter."""

from __future__ import annotations

from typing import Any

import torch

from training.adapters import load_adapter
from training.loading import Checkpoint, load_weights


def load_for_inference(checkpoint: Checkpoint, adapter: str | None = None) -> Any:
    """The model in the precision it was saved in, on the GPU where there is one, with its adapter if it has one.

    Raises:
        ConfigError: weights or adapter cannot be read.
    """
    model = load_weights(checkpoint, checkpoint.dtype)
    if adapter is not None:
        model = load_adapter(model, adapter, "--adapter")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
