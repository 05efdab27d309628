"""Loading a model for inference: a base, or a base with its adapter."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from checkpoints.model_config import Quantization, load_base_quantization
from loading.adapter_check import check_adapter
from loading.adapters import load_adapter
from loading.checkpoint import Checkpoint, load_model

logger = logging.getLogger(__name__)


def load_for_inference(checkpoint: Checkpoint, adapter: str | None = None, any_base: bool = False) -> Any:
    """Load a model in its saved precision, on the GPU if there is one, with an adapter if one is given.

    If the adapter was trained on a base quantised while loading, the base is quantised the same way. Quantised models
    compute in float32 on a CPU.

    Args:
        any_base: accept an adapter that was trained on other weights, with a warning.

    Raises:
        ConfigError: weights or adapter cannot be read or do not fit, or a required library is not installed.
    """
    if adapter is not None:
        check_adapter(checkpoint, adapter, "--adapter", any_base)
    on_gpu = torch.cuda.is_available()
    quantize = _quantization_of(checkpoint, adapter)
    dtype = checkpoint.dtype if on_gpu or not (checkpoint.quantization or quantize) else torch.float32
    model = load_model(checkpoint, dtype, quantize=quantize)
    if adapter is not None:
        model = load_adapter(model, adapter, "--adapter")
    return (model if model.device.type == "cuda" else model.to("cuda" if on_gpu else "cpu")).eval()


def _quantization_of(checkpoint: Checkpoint, adapter: str | None) -> Quantization | None:
    """Return how to quantise the base while loading it; ``None``: its weights are already those of training."""
    quantization = None if adapter is None else load_base_quantization(Path(adapter))
    if quantization is None or quantization.is_packed or checkpoint.quantization is not None:
        return None
    logger.info("--adapter %s was trained on %s: the base is quantised the same way", adapter, quantization)
    return quantization
