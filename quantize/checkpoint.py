"""Quantise a checkpoint: write the folder with all its files, and measure the perplexity before and after."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints.base_files import CONFIG, set_values, values_of, write_files
from checkpoints.files import save_json
from checkpoints.folders import staged_folder
from checkpoints.model_config import Quantization, check_bitsandbytes, dtype_name, result_config
from checkpoints.names import QUANTIZATION_REPORT
from checkpoints.shards import open_checkpoint
from checkpoints.writing import save_checkpoint
from data_utils.encode import UnweightedExample
from errors import ConfigError, RunError, one_line
from loading.chat_family import add_chat_template
from loading.checkpoint import Checkpoint, load_checkpoint, load_model
from loading.quantized import compute_in_float32
from quantize.blocks import SampleStates, pop_blocks, stored_tensors
from quantize.calibration import Samples
from quantize.gptq import is_symmetric
from quantize.packed import Measurements, check_sizes, max_inputs, quantize_weights
from quantize.perplexity import AnswerLosses
from qwen_model.architectures import TEXT_TYPES

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True)
class Result:
    """Losses of the held-out answers, errors of the layers, and size of the weight files in bytes.

    Attributes:
        nearest: losses if the weights are rounded to nearest instead; ``None`` for NF4, which is rounded to nearest.
        errors: of each quantised layer, see ``packed.Measurements``; none for NF4.
    """

    before: AnswerLosses
    after: AnswerLosses
    nearest: AnswerLosses | None
    errors: dict[str, float]
    bytes_before: int
    bytes_after: int

    @property
    def worst_layer(self) -> str | None:
        return max(self.errors, key=self.errors.__getitem__, default=None)


def check_quantizable(checkpoint: Checkpoint, quantization: Quantization) -> None:
    """Raise ``ConfigError`` if a checkpoint cannot be quantised this way; its weights are not read."""
    if checkpoint.quantization is not None:
        raise ConfigError(
            f"--model_name_or_path {checkpoint.name}: its weights are already quantised ({checkpoint.quantization})",
            "Give the unquantised model",
        )
    if checkpoint.model_type in TEXT_TYPES.values():
        raise ConfigError(
            f"--model_name_or_path {checkpoint.name}: model_type {checkpoint.model_type} is not written quantised: its "
            "delta nets sum the errors of rounded weights over a text, and no program was tried on such a file",
            "Train it with --q_lora, which quantises it while loading",
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
            before, nearest, errors, quantization_config = write(checkpoint, quantization, samples, folder, device)
            _save_companion_files(checkpoint, quantization_config, folder)
            # Of the written folder, as it will be loaded.
            after = measure_losses(load_model(load_checkpoint(str(folder)), torch.float32), samples.held_out, device)
        except torch.OutOfMemoryError as error:
            raise RunError(f"out of memory ({one_line(error)})", "Lower --model_max_length") from error
        if not (math.isfinite(before.perplexity) and math.isfinite(after.perplexity)):
            what = f"the perplexity of the held-out conversations is {before.perplexity} before and {after.perplexity}"
            raise RunError(f"{what} after quantising", "Check the weights of the checkpoint")
        bytes_before, bytes_after = _size_of_weights(checkpoint.folder), _size_of_weights(folder)
        result = Result(before, after, nearest, errors, bytes_before, bytes_after)
        if nearest is not None and after.perplexity > nearest.perplexity:
            logger.warning(
                "the perplexity after quantising is %.4f, after rounding to nearest it would be %.4f. Calibrate with "
                "more data that resemble what the model will be asked: --data_path, --samples",
                after.perplexity, nearest.perplexity,
            )  # fmt: skip
        save_json(_report(quantization, samples, result), folder / QUANTIZATION_REPORT)
    return result


def _report(quantization: Quantization, samples: Samples, result: Result) -> dict[str, Any]:
    """Return the contents of ``quantization_report.json``."""
    models = {"before": result.before, "after": result.after, "nearest": result.nearest}
    measured = {name: losses for name, losses in models.items() if losses is not None}
    return {
        "version": 1,
        "quantization": str(quantization),
        "calibration": {"conversations": len(samples.calibration), "tokens": samples.calibration_tokens},
        "held_out": {"conversations": len(samples.held_out), "answer_tokens": result.before.num_tokens},
        "perplexity": {name: losses.perplexity for name, losses in measured.items()},
        "change": {
            name: losses.change_from(result.before).as_dict() for name, losses in measured.items() if name != "before"
        },
        "worst_layer": result.worst_layer,
        "layer_errors": result.errors,
    }


class _Written(NamedTuple):
    """Parts of a ``Result``, and the quantization_config of the written weights."""

    before: AnswerLosses
    nearest: AnswerLosses | None
    errors: dict[str, float]
    quantization_config: dict[str, Any]


def _write_packed(
    checkpoint: Checkpoint, quantization: Quantization, samples: Samples, folder: Path, device: torch.device
) -> _Written:
    model = _load_unquantised(checkpoint)
    original, nearest, calibration = (
        SampleStates(model, part, device) for part in (samples.held_out, samples.held_out, samples.calibration)
    )
    measured = Measurements(original, nearest)
    tensors = quantize_weights(model, quantization, calibration, measured, checkpoint.dtype)
    save_checkpoint(tensors, folder, MAX_SHARD_SIZE)
    before, rounded = original.answer_losses(model), nearest.answer_losses(model)
    return _Written(before, rounded, measured.errors, _packed_config(quantization))


def _write_by_bitsandbytes(
    checkpoint: Checkpoint, quantization: Quantization, samples: Samples, folder: Path, device: torch.device
) -> _Written:
    before = measure_losses(_load_unquantised(checkpoint), samples.held_out, device)
    model = load_model(checkpoint, torch.float32, quantize=quantization)
    save_checkpoint(((name, tensor.cpu()) for name, tensor in stored_tensors(model)), folder, MAX_SHARD_SIZE)
    config = model.config.quantization_config.to_dict()
    return _Written(before, None, {}, {**config, "bnb_4bit_compute_dtype": dtype_name(checkpoint.dtype)})


def _load_unquantised(checkpoint: Checkpoint) -> Any:
    """Load the model in the dtype in which it is stored; it computes in float32."""
    model = load_model(checkpoint, checkpoint.dtype)
    if checkpoint.dtype != torch.float32:
        compute_in_float32(model)
    return model


def measure_losses(model: Any, examples: Sequence[UnweightedExample], device: torch.device) -> AnswerLosses:
    """Return the losses of a model; its blocks are freed on the way."""
    states = SampleStates(model, examples, device)
    for index, block in pop_blocks(model, device, "Measuring"):
        states.advance(index, block)
    return states.answer_losses(model)


def _size_of_weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in open_checkpoint(folder).files)


def _packed_config(quantization: Quantization) -> dict[str, Any]:
    """Return ``quantization_config`` with the keys that other libraries read."""
    config = {"quant_method": quantization.method, "bits": quantization.bits, "group_size": quantization.group_size}
    if quantization.method == "awq":
        return {**config, "version": "gemm", "zero_point": True, "modules_to_not_convert": None}
    layout = {"checkpoint_format": "gptq", "desc_act": False, "sym": is_symmetric(quantization), "static_groups": False}
    return {**config, **layout, "true_sequential": True, "lm_head": False}


def _save_companion_files(checkpoint: Checkpoint, quantization_config: dict[str, Any], folder: Path) -> None:
    """Write the base's tokenizer and settings as they are, and its config.json with the quantisation."""
    files = dict(checkpoint.files)
    config = result_config(values_of(files, CONFIG), dtype_name(checkpoint.dtype))
    set_values(files, CONFIG, config | {"quantization_config": quantization_config})
    add_chat_template(files, checkpoint.model_type)
    write_files(files, folder)
