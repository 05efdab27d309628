"""A warning about a first loss that tells of a tokenizer or data of another model."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)


def check_first_loss(model: nn.Module, loss: float) -> None:
    """Warn if trained weights predict worse than guessing; untrained ones may."""
    config: Any = model.config
    limit = math.log(config.vocab_size) + 1
    if loss > limit and not is_untrained(model):
        logger.warning(
            "The first loss is %.2f, above ln(vocabulary) + 1 = %.2f: worse than guessing among %s tokens. "
            "Check that data and tokenizer belong to --model_name_or_path",
            loss, limit, f"{config.vocab_size:,}",
        )  # fmt: skip


def is_untrained(model: nn.Module) -> bool:
    """Return whether the weights are random: every norm still has the ones or zeros that it starts with."""
    norms = [_local(module.weight) for module in model.modules() if "norm" in type(module).__name__.lower()]
    known = [weight for weight in norms if weight.numel()]
    return bool(known) and all(bool((weight == 1).all() or (weight == 0).all()) for weight in known)


def _local(weight: Any) -> Any:
    """Return this rank's part of a parameter that ZeRO-3 or FSDP shards."""
    return weight.to_local() if hasattr(weight, "to_local") else getattr(weight, "ds_tensor", weight)
