"""Checks of the length of samples against the positions of the model, and of the flags that extend them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoints.rope import MOST_FACTOR, MOST_POSITIONS, Yarn, find_yarn_fault, load_yarn, with_yarn
from errors import ConfigError
from loading.config_files import max_positions
from training.config.args import ModelArguments, RunArguments


def check_positions(args: RunArguments, config: Mapping[str, Any]) -> Iterator[ConfigError]:
    """Yield the faults of ``--model_max_length`` and ``--rope_*``.

    Args:
        config: contents of config.json; empty if it is not on this disk yet.
    """
    model, length = args.model, args.data.model_max_length
    yield from rope_flag_faults(model)
    fault = find_yarn_fault(config) if config else ""
    if model.rope_scaling is not None and fault:
        yield ConfigError(f"--rope_scaling {model.rope_scaling}: {fault}", "Leave out --rope_scaling")
        return
    positions = max_positions(with_yarn(config, model.yarn))
    if positions is None or length <= positions:
        return
    fix = f"Give {positions} or less"
    factor = math.ceil(length * (model.yarn.factor if model.yarn else 1) / positions)
    if not fault and factor <= MOST_FACTOR:
        fix += f", or extend them with --rope_scaling yarn --rope_factor {factor}"
    what = f"--model_max_length {length} exceeds the {positions} positions of {model.model_name_or_path}"
    yield ConfigError(what, fix)


def rope_flag_faults(model: ModelArguments) -> Iterator[ConfigError]:
    """Yield the faults of ``--rope_*`` that need no checkpoint."""
    factor, original = model.rope_factor, model.rope_original_length
    if model.rope_scaling is None:
        for name, value in (("rope_factor", factor), ("rope_original_length", original)):
            if value is not None:
                fix = f"Add --rope_scaling yarn, or remove --{name}"
                yield ConfigError(f"--{name} {value:g} has no effect without --rope_scaling", fix)
        return
    if factor is None:
        fix = "Give --rope_factor, such as 4 for four times the positions"
        yield ConfigError(f"--rope_scaling {model.rope_scaling} needs a factor", fix)
    elif not 1 < factor <= MOST_FACTOR:
        yield ConfigError(f"--rope_factor {factor:g} is out of range", f"Give more than 1, up to {MOST_FACTOR}")
    if original is not None and not 1 <= original <= MOST_POSITIONS:
        yield ConfigError(f"--rope_original_length {original} is out of range", f"Give 1 to {MOST_POSITIONS:,}")


def check_continued_scaling(adapter: str, yarn: Yarn | None) -> None:
    """Check that an adapter that was trained with scaled rotary embeddings is continued with the same.

    Args:
        adapter: ``--lora_weight_path``.
        yarn: of the run.

    Raises:
        ConfigError: they are scaled otherwise.
    """
    trained = load_yarn(Path(adapter))
    if trained is not None and trained != yarn:
        flags = f"--rope_scaling yarn --rope_factor {trained.factor:g}"
        if trained.original_max_position_embeddings is not None:
            flags += f" --rope_original_length {trained.original_max_position_embeddings}"
        what = f"--lora_weight_path {adapter} was trained with {trained}, this run has {yarn or 'unscaled positions'}"
        raise ConfigError(what, f"Give {flags}")
