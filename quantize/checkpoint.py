"""From a checkpoint to a quantised one: the folder with all its files, and what it cost."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.files import load_json, save_json
from checkpoints.folders import staged_folder
from checkpoints.model_config import Quantization, check_bitsandbytes, with_dtype
from checkpoints.shards import open_checkpoint
from checkpoints.writing import save_checkpoint
from data_utils.encode import UnweightedExample
from errors import ConfigError, RunError, one_line
from loading.checkpoint import Checkpoint, load_checkpoint, load_model
from loading.quantized import compute_in_float32
from quantize.blocks import Stream, stored_tensors, take_blocks
from quantize.calibration import Samples
from quantize.packed import check_sizes, most_inputs, quantize_weights

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True)
class Result:
    """What quantising cost: perplexity of the held-out answers and size of the weight files in bytes."""

    perplexity_before: float
    perplexity_after: float
    targets: int
    bytes_before: int
    bytes_after: int


def check_quantizable(checkpoint: Checkpoint, quantization: Quantization) -> None:
    """Raise ``ConfigError`` for a checkpoint that cannot be quantised this way, before its weights are read."""
    if checkpoint.quantization is not None:
        raise ConfigError(
            f"--model_name_or_path {checkpoint.name}: its weights are quantised already ({checkpoint.quantization})",
            "Give the unquantised model",
        )
    check_sizes(open_checkpoint(checkpoint.folder), checkpoint.model_type, quantization)
    if not quantization.is_packed:
        check_bitsandbytes("--format nf4")


def quantize_checkpoint(
    checkpoint: Checkpoint, quantization: Quantization, samples: Samples, output_dir: Path
) -> Result:
    """Write the quantised checkpoint to ``output_dir``, which appears when it is whole and has been read back.

    Raises:
        ConfigError: weights that cannot be read, an output folder that is taken.
        RunError: weights that cannot be quantised, whose loss is no number, or for which the GPU is too small.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    widest = most_inputs(open_checkpoint(checkpoint.folder), checkpoint.model_type)
    if quantization.is_packed and samples.calibration_tokens < widest:
        logger.warning(
            "%d tokens are few to calibrate layers of %d inputs with. Give more data, or raise --samples",
            samples.calibration_tokens,
            widest,
        )
    write = _write_packed if quantization.is_packed else _write_by_bitsandbytes
    with staged_folder(output_dir, "--output_dir") as folder:
        try:
            before, targets, saved_config = write(checkpoint, quantization, samples, folder, device)
            _save_others(checkpoint, saved_config, folder)
            after = _measure_saved(folder, samples.held_out, device)
        except torch.OutOfMemoryError as error:
            raise RunError(f"out of memory ({one_line(error)})", "Lower --model_max_length") from error
        if not (math.isfinite(before) and math.isfinite(after)):
            what = f"the perplexity of the held-out conversations is {before} before and {after} after quantising"
            raise RunError(what, "Check the weights of the checkpoint")
        sizes = [_size_of_weights(each) for each in (checkpoint.folder, folder)]
    return Result(before, after, targets, sizes[0], sizes[1])


# What these write the weights with gives the perplexity before, the number of its targets, and quantization_config.
Written = tuple[float, int, dict[str, Any]]


def _write_packed(
    checkpoint: Checkpoint, quantization: Quantization, samples: Samples, folder: Path, device: torch.device
) -> Written:
    model = _load_float(checkpoint)
    held_out, calibration = (Stream(model, each, device) for each in (samples.held_out, samples.calibration))
    tensors = quantize_weights(model, quantization, calibration, held_out, checkpoint.dtype)
    save_checkpoint(tensors, folder, MAX_SHARD_SIZE)
    return held_out.perplexity(model), held_out.targets, _packed_config(quantization)


def _write_by_bitsandbytes(
    checkpoint: Checkpoint, quantization: Quantization, samples: Samples, folder: Path, device: torch.device
) -> Written:
    model = _load_float(checkpoint)
    held_out = Stream(model, samples.held_out, device)
    _pass_all(model, held_out)
    before = held_out.perplexity(model)
    del model
    quantised = load_model(checkpoint, torch.float32, quantize=quantization)
    tensors = ((name, tensor.cpu()) for name, tensor in stored_tensors(quantised))
    save_checkpoint(tensors, folder, MAX_SHARD_SIZE)
    config = quantised.config.quantization_config.to_dict()
    return before, held_out.targets, {**config, "bnb_4bit_compute_dtype": _name_of(checkpoint.dtype)}


def _load_float(checkpoint: Checkpoint) -> Any:
    """The model in the precision it is stored in, which computes in float32."""
    model = load_model(checkpoint, checkpoint.dtype)
    if checkpoint.dtype != torch.float32:
        compute_in_float32(model)
    return model


def _size_of_weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in open_checkpoint(folder).files)


def _pass_all(model: Any, stream: Stream) -> None:
    for index, block in take_blocks(model, stream.device, "Measuring"):
        stream.pass_through(index, block)


def _measure_saved(folder: Path, held_out: Sequence[UnweightedExample], device: torch.device) -> float:
    """The perplexity of what lies on disk, as everyone will load it."""
    model = load_model(load_checkpoint(str(folder)), torch.float32)
    stream = Stream(model, held_out, device)
    _pass_all(model, stream)
    return stream.perplexity(model)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _packed_config(quantization: Quantization) -> dict[str, Any]:
    """``quantization_config`` under the keys that other libraries read."""
    config = {"quant_method": quantization.method, "bits": quantization.bits, "group_size": quantization.group_size}
    if quantization.method == "awq":
        return {**config, "version": "gemm", "zero_point": True, "modules_to_not_convert": None}
    layout = {"checkpoint_format": "gptq", "desc_act": False, "sym": True, "static_groups": False}
    return {**config, **layout, "true_sequential": True, "lm_head": False}


def _save_others(checkpoint: Checkpoint, quantization_config: dict[str, Any], folder: Path) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    # No remote code ships with the result.
    config = {key: value for key, value in load_json(checkpoint.folder / "config.json").items() if key != "auto_map"}
    config = with_dtype(config, _name_of(checkpoint.dtype))
    save_json(config | {"quantization_config": quantization_config}, folder / "config.json")
    if (checkpoint.folder / "generation_config.json").is_file():
        shutil.copyfile(checkpoint.folder / "generation_config.json", folder / "generation_config.json")
    checkpoint.tokenizer.save_pretrained(folder)
