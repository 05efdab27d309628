"""Quantise a checkpoint: write the folder with all its files, and measure the perplexity before and after."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints.companions import copy_companion
from checkpoints.files import load_json, save_json
from checkpoints.folders import staged_folder
from checkpoints.model_config import Quantization, check_bitsandbytes, with_dtype
from checkpoints.shards import open_checkpoint
from checkpoints.writing import save_checkpoint
from data_utils.encode import UnweightedExample
from errors import ConfigError, RunError, one_line
from loading.checkpoint import Checkpoint, load_checkpoint, load_model
from loading.quantized import compute_in_float32
from quantize.blocks import SampleStates, pop_blocks, stored_tensors
from quantize.calibration import Samples
from quantize.packed import check_sizes, max_inputs, quantize_weights

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True)
class Result:
    """Perplexity of the held-out answers, and size of the weight files in bytes, before and after quantising.

    Attributes:
        num_targets: tokens over which the perplexity was measured.
    """

    perplexity_before: float
    perplexity_after: float
    num_targets: int
    bytes_before: int
    bytes_after: int


def check_quantizable(checkpoint: Checkpoint, quantization: Quantization) -> None:
    """Raise ``ConfigError`` if a checkpoint cannot be quantised this way; its weights are not read."""
    if checkpoint.quantization is not None:
        raise ConfigError(
            f"--model_name_or_path {checkpoint.name}: its weights are already quantised ({checkpoint.quantization})",
            "Give the unquantised model",
        )
    check_sizes(open_checkpoint(checkpoint.folder), checkpoint.model_type, quantization)
    if not quantization.is_packed:
        check_bitsandbytes("--format nf4")


def quantize_checkpoint(
    checkpoint: Checkpoint, quantization: Quantization, samples: Samples, output_dir: Path
) -> Result:
    """Write the quantised checkpoint to ``output_dir``, which appears after it is complete and was read back.

    Raises:
        ConfigError: weights that cannot be read, an output folder that is not free.
        RunError: weights that cannot be quantised, a perplexity that is not finite, out of memory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    widest = max_inputs(open_checkpoint(checkpoint.folder), checkpoint.model_type)
    if quantization.is_packed and samples.calibration_tokens < widest:
        logger.warning(
            "%d tokens are few to calibrate layers with %d inputs. Give more data, or raise --samples",
            samples.calibration_tokens,
            widest,
        )
    write = _write_packed if quantization.is_packed else _write_by_bitsandbytes
    with staged_folder(output_dir, "--output_dir") as folder:
        try:
            before, num_targets, quantization_config = write(checkpoint, quantization, samples, folder, device)
            _save_companion_files(checkpoint, quantization_config, folder)
            # Of the written folder, as it will be loaded.
            after, _ = _measure_perplexity(
                load_model(load_checkpoint(str(folder)), torch.float32), samples.held_out, device
            )
        except torch.OutOfMemoryError as error:
            raise RunError(f"out of memory ({one_line(error)})", "Lower --model_max_length") from error
        if not (math.isfinite(before) and math.isfinite(after)):
            what = f"the perplexity of the held-out conversations is {before} before and {after} after quantising"
            raise RunError(what, "Check the weights of the checkpoint")
        bytes_before, bytes_after = _size_of_weights(checkpoint.folder), _size_of_weights(folder)
    return Result(before, after, num_targets, bytes_before, bytes_after)


class _Written(NamedTuple):
    """The perplexity before quantising, its number of targets, and the quantization_config of the written weights."""

    perplexity_before: float
    num_targets: int
    quantization_config: dict[str, Any]


def _write_packed(
    checkpoint: Checkpoint, quantization: Quantization, samples: Samples, folder: Path, device: torch.device
) -> _Written:
    model = _load_unquantised(checkpoint)
    held_out, calibration = (SampleStates(model, part, device) for part in (samples.held_out, samples.calibration))
    tensors = quantize_weights(model, quantization, calibration, held_out, checkpoint.dtype)
    save_checkpoint(tensors, folder, MAX_SHARD_SIZE)
    return _Written(held_out.perplexity(model), held_out.num_targets, _packed_config(quantization))


def _write_by_bitsandbytes(
    checkpoint: Checkpoint, quantization: Quantization, samples: Samples, folder: Path, device: torch.device
) -> _Written:
    before, num_targets = _measure_perplexity(_load_unquantised(checkpoint), samples.held_out, device)
    model = load_model(checkpoint, torch.float32, quantize=quantization)
    save_checkpoint(((name, tensor.cpu()) for name, tensor in stored_tensors(model)), folder, MAX_SHARD_SIZE)
    config = model.config.quantization_config.to_dict()
    return _Written(before, num_targets, {**config, "bnb_4bit_compute_dtype": _name_of(checkpoint.dtype)})


def _load_unquantised(checkpoint: Checkpoint) -> Any:
    """Load the model in the dtype in which it is stored; it computes in float32."""
    model = load_model(checkpoint, checkpoint.dtype)
    if checkpoint.dtype != torch.float32:
        compute_in_float32(model)
    return model


def _measure_perplexity(model: Any, examples: Sequence[UnweightedExample], device: torch.device) -> tuple[float, int]:
    """Return the perplexity of a model and its number of targets; the model's blocks are freed on the way."""
    states = SampleStates(model, examples, device)
    for index, block in pop_blocks(model, device, "Measuring"):
        states.advance(index, block)
    return states.perplexity(model), states.num_targets


def _size_of_weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in open_checkpoint(folder).files)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _packed_config(quantization: Quantization) -> dict[str, Any]:
    """Return ``quantization_config`` with the keys that other libraries read."""
    config = {"quant_method": quantization.method, "bits": quantization.bits, "group_size": quantization.group_size}
    if quantization.method == "awq":
        return {**config, "version": "gemm", "zero_point": True, "modules_to_not_convert": None}
    layout = {"checkpoint_format": "gptq", "desc_act": False, "sym": True, "static_groups": False}
    return {**config, **layout, "true_sequential": True, "lm_head": False}


def _save_companion_files(checkpoint: Checkpoint, quantization_config: dict[str, Any], folder: Path) -> None:
    """Write config.json, generation_config.json and the tokenizer's files."""
    # Without auto_map: the result contains no remote code.
    config = {key: value for key, value in load_json(checkpoint.folder / "config.json").items() if key != "auto_map"}
    config = with_dtype(config, _name_of(checkpoint.dtype))
    save_json(config | {"quantization_config": quantization_config}, folder / "config.json")
    copy_companion("generation_config.json", [checkpoint.folder], folder)
    checkpoint.tokenizer.save_pretrained(folder)
