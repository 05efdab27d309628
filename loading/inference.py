"""Loading a model for inference: a base, or a base with its adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoints.model_config import Quantization, load_base_quantization
from checkpoints.rope import common_yarn
from errors import ConfigError
from loading.adapter_check import check_adapter
from loading.adapters import load_adapter
from loading.checkpoint import Checkpoint, load_model, scaled_checkpoint

logger = logging.getLogger(__name__)


def load_for_inference(
    checkpoint: Checkpoint,
    adapter: str | None = None,
    any_base: bool = False,
    others: Mapping[str, str] | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> Any:
    """Load a model in its saved precision, on the GPU if there is one, with an adapter if one is given.

    If the adapter was trained on a base quantised while loading, the base is quantised the same way; so are its rotary
    embeddings scaled. Quantised models compute in float32 on a CPU.

    Args:
        adapter: folder of the adapter that is active; its name in the model is ``default``.
        any_base: accept an adapter that was trained on other weights, with a warning.
        others: folders of more adapters by their names in the model.
        device_map: ``auto`` spreads the model over all GPUs; or as in ``from_pretrained``.

    Raises:
        ConfigError: weights or adapters cannot be read or do not fit, adapters of differently quantised bases, or a
            required library is not installed.
    """
    adapters = {**({} if adapter is None else {"default": adapter}), **(others or {})}
    for folder in adapters.values():
        check_adapter(checkpoint, folder, "--adapter", any_base)
    checkpoint = scaled_checkpoint(checkpoint, common_yarn(map(Path, adapters.values())))
    on_gpu = torch.cuda.is_available()
    quantize = _quantization_of(checkpoint, list(adapters.values()))
    dtype = checkpoint.dtype if on_gpu or not (checkpoint.quantization or quantize) else torch.float32
    model = load_model(checkpoint, dtype, quantize=quantize, device_map=device_map)
    for name, folder in adapters.items():
        model = load_adapter(model, folder, "--adapter", name=name)
    if device_map is not None or model.device.type == "cuda":
        return model.eval()
    return model.to("cuda" if on_gpu else "cpu").eval()


def _quantization_of(checkpoint: Checkpoint, adapters: Sequence[str]) -> Quantization | None:
    """Return how to quantise the base while loading it; ``None``: its weights are already those of training.

    Raises:
        ConfigError: two adapters were trained on weights that were quantised differently.
    """
    if checkpoint.quantization is not None:
        return None
    found: dict[str, Quantization | None] = {}
    for folder in adapters:
        quantization = load_base_quantization(Path(folder))
        found[folder] = None if quantization is None or quantization.is_packed else quantization
    if len(set(found.values())) > 1:
        first, other = (next(iter(found)), next(each for each in found if found[each] != found[adapters[0]]))
        raise ConfigError(
            f"--adapter {other} was trained on {found[other] or 'weights as they are stored'}, {first} on "
            f"{found[first] or 'weights as they are stored'}: one base cannot be both",
            "Load them one at a time",
        )
    quantize = next(iter(found.values()), None)
    if quantize is not None:
        logger.info("--adapter %s was trained on %s: the base is quantised the same way", adapters[0], quantize)
    return quantize
