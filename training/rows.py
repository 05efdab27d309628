"""Whether a run's batches are rows without padding, whether these are packed, and whether a step joins them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from errors import ConfigError
from training.config.args import RunArguments
from training.config.engines import find_engine

# The attention that keeps the samples of a row apart; None: transformers' default, which is sdpa or eager.
ATTENTION = (None, "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4")
COMPILE_FLAGS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def why_padded(args: RunArguments, config: Mapping[str, Any]) -> str:
    """Return why the batches of a run are padded; empty if they are rows without padding.

    Args:
        config: the values of the model's config.json; its ``model_type`` is supported.
    """
    if not args.data.padding_free:
        return "--padding_free False"
    attention = args.model.attn_implementation
    if attention not in ATTENTION:
        return f"--attn_implementation {attention} does not keep samples of one row apart"
    if config.get("output_attentions"):
        return "output_attentions of config.json asks for the attention weights of rows"
    for name in COMPILE_FLAGS:
        if value := args.trainer_value(name):
            return f"--{name} {value} would compile anew for the lengths of every batch"
    return ""


def why_unpacked(args: RunArguments, config: Mapping[str, Any]) -> str:
    """Return why ``--packing auto`` packs nothing, whatever the data; empty if it packs plain text.

    Args:
        config: see ``why_padded``.
    """
    if args.trainer_value("train_sampling_strategy") == "group_by_length":
        return "--train_sampling_strategy group_by_length forms batches in another way"
    reason = why_padded(args, config)
    return reason and f"batches are padded: {reason}"


def why_apart(args: RunArguments, processes: int | None = None) -> str:
    """Return why the rows of a step are not joined, whatever the model; empty if they are, unless they are padded.

    Args:
        processes: of the run; ``None``: as the launcher has started.
    """
    if not args.options.join_micro_batches:
        return "--join_micro_batches False"
    engine = find_engine(args.trainer, processes)
    if engine.name not in ("none", "ddp"):  # it communicates in every forward or backward pass
        return f"with {engine.title} every rank has to compute as many micro-batches"
    return ""


def choose_packing(args: RunArguments, config: Mapping[str, Any]) -> bool | None:
    """Return whether ``--packing`` packs the training samples; ``None``: if any of them is plain text.

    Args:
        config: see ``why_padded``.

    Raises:
        ConfigError: ``--packing``, but batches are padded.
    """
    packing, reason = args.data.packing, why_padded(args, config)
    if packing is True and reason:
        raise ConfigError(f"--packing True needs rows without padding: {reason}", "Remove one of them")
    if packing != "auto":
        return packing
    return False if why_unpacked(args, config) else None
