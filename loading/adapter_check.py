"""Checks of an adapter against a checkpoint before weights are loaded: those of a merge, for answers and training."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from checkpoints.adapter import read_adapter
from checkpoints.base_check import check_trained_on
from checkpoints.dequantized_reader import open_dequantized
from checkpoints.fold import check_fits
from checkpoints.model_config import Quantization, load_base_quantization
from checkpoints.shards import open_checkpoint
from checkpoints.whole import load_text_config
from errors import ConfigError
from loading.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


def check_adapter(checkpoint: Checkpoint, folder: str, flag: str, any_base: bool = False) -> None:
    """Check that an adapter can be used, fits a checkpoint, and was trained on its weights.

    Args:
        flag: the flag that named the adapter's folder.
        any_base: warn of other weights than those of its training instead of raising.

    Raises:
        ConfigError: no adapter, an unsupported option, a value that is not finite, a tensor that fits no tensor of the
            checkpoint, or one that was trained on other weights.
    """
    adapter = read_adapter(folder, flag)
    check_trained_on(checkpoint.folder, [adapter], any_base, (flag, "--model_name_or_path"))
    source, stored = open_dequantized(checkpoint.folder, torch.float16), open_checkpoint(checkpoint.folder).names()
    try:
        check_fits(source, load_text_config(checkpoint.folder), adapter, stored)
    except ConfigError as error:
        raise ConfigError(f"{flag} {error}") from error


def warn_of_other_form(folder: str, flag: str, quantization: Quantization | None) -> None:
    """Warn if an adapter is continued on weights that bitsandbytes quantises otherwise than in its training.

    Args:
        quantization: of the weights in memory; ``None`` if they are not quantised.
    """
    both = (load_base_quantization(Path(folder)), quantization)
    trained_on, used = (None if each is None or each.is_packed else each for each in both)
    if trained_on != used:
        logger.warning(
            "%s %s was trained on %s, this run continues it on %s",
            flag,
            folder,
            trained_on or "weights as they are stored",
            used or "weights as they are stored",
        )
