"""A model as it is used: base, or base and adapter."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from checkpoints.model_config import Quantization, load_base_quantization
from loading.adapters import load_adapter
from loading.checkpoint import Checkpoint, load_model

logger = logging.getLogger(__name__)


def load_for_inference(checkpoint: Checkpoint, adapter: str | None = None) -> Any:
    """The model in the precision it was saved in, on the GPU where there is one, with its adapter if it has one.

    A base that was quantised to train the adapter on is quantised the same way again: that is the model which learnt.
    A quantised model computes in float32 on a CPU.

    Raises:
        ConfigError: weights or adapter cannot be read, or a library that they need is not installed.
    """
    on_gpu = torch.cuda.is_available()
    quantize = _quantization_of(checkpoint, adapter)
    dtype = checkpoint.dtype if on_gpu or not (checkpoint.quantization or quantize) else torch.float32
    model = load_model(checkpoint, dtype, quantize=quantize)
    if adapter is not None:
        model = load_adapter(model, adapter, "--adapter")
    return (model if model.device.type == "cuda" else model.to("cuda" if on_gpu else "cpu")).eval()


def _quantization_of(checkpoint: Checkpoint, adapter: str | None) -> Quantization | None:
    """How the base has to be quantised for an adapter; ``None`` where its weights are as they were in training."""
    trained = None if adapter is None else load_base_quantization(Path(adapter))
    if trained is None or trained.is_packed or checkpoint.quantization is not None:
        return None
    logger.info("--adapter %s was trained on %s: the base is quantised the same way", adapter, trained)
    return trained
