"""Merges into other weights than those of the training: what a quantised base computed, against what is written.

Q-LoRA trains an adapter beside quantised weights. Merged into the unquantised ones, the adapter is the same and the
weights beside it are not: the result is correct as a merge, and answers differently from what was trained. How much is
measured here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.adapter import Adapter
from checkpoints.dequantized_reader import open_dequantized
from checkpoints.files import load_json, load_json_or_empty
from checkpoints.model_config import Quantization, check_bitsandbytes, load_base_quantization
from checkpoints.names import RUN_SUMMARY
from checkpoints.packed_weights import dequantize_8bit
from checkpoints.shards import fingerprint
from checkpoints.source import TensorSource, View
from errors import ConfigError
from export.inputs import find_base
from export.layouts.convert import convert_model
from export.layouts.qwen2_names import layout_of_config
from export.merging import MergePlan
from export.progress import steps_bar
from export.verify.compare import verify_merge
from export.verify.prompts import prompt_ids
from qwen_model.architectures import architecture_of

logger = logging.getLogger(__name__)

Read = Callable[[str], Tensor]
"""Name of a weight -> the weight [O, I] in float32, as it was in training."""


class TrainedForm(View):
    """A base whose linear layers have the weights that an adapter was trained beside.

    Args:
        below: the unquantised base.
        read: returns the weight that training used instead of one of ``below``.
        model_type: of the base; decides which weights are quantised.
    """

    def __init__(self, below: TensorSource, read: Read, model_type: str) -> None:
        super().__init__(below)
        architecture = architecture_of(model_type)
        layers = tuple(f".{name}.weight" for name in architecture.linear_layers)
        in_blocks = (name for name in below.names() if name.startswith(f"{architecture.blocks}."))
        self._quantized = {name for name in in_blocks if name.endswith(layers)}
        self._read, self._last = read, ("", torch.empty(0))
        self._measured: set[str] = set()
        self._squared_error = self._squared_value = 0.0

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name not in self._quantized:
            return self.below.rows(name, start, stop)
        if self._last[0] != name:
            self._last = name, self._read(name)
            self._measure(name, self._last[1])
        return self._last[1][start:stop]

    def _measure(self, name: str, weight: Tensor) -> None:
        if name not in self._measured:
            self._measured.add(name)
            plain = self.below.read(name).to(torch.float32)
            self._squared_error += float((weight - plain).square().sum(dtype=torch.float64))
            self._squared_value += float(plain.square().sum(dtype=torch.float64))

    def relative_error(self) -> float:
        """Return the norm of the difference from the base divided by the norm of the base, over the weights read."""
        return (self._squared_error / self._squared_value) ** 0.5 if self._squared_value else 0.0


@dataclass(frozen=True)
class _Training:
    """How a base was quantised in the training of an adapter: known to the library, or only by its name."""

    title: str
    adapter: Adapter
    quantization: Quantization | None


def compare_with_training(plan: MergePlan, folder: Path, measures: bool) -> list[str]:
    """Describe, and log as warnings, how a merged folder differs from what its adapters were trained as.

    Args:
        measures: measure the differences of weights and logits.

    Returns:
        A line for each form of the base that an adapter was trained beside; none if it was the one merged into.
    """
    if plan.base.quantization is not None:
        return []
    lines = []
    trainings = (_training_of(each.adapter) for each in plan.adapters)
    for training in {each.title: each for each in trainings if each is not None}.values():
        line = (
            f"{training.adapter.folder.name} was trained beside weights quantised as {training.title}, and this model "
            f"has the unquantised weights of {plan.base.folder.name}: it answers differently from what was trained"
        )
        try:
            measured = _measure(plan, training, folder) if measures else "not measured: --no_verify"
        except ConfigError as error:
            measured = f"not measured: {error}"
        lines.append(f"{line} ({measured})")
        logger.warning("%s", lines[-1])
    return lines


def _training_of(adapter: Adapter) -> _Training | None:
    """Return how the base was quantised in an adapter's training; ``None`` if it was not."""
    quantization = load_base_quantization(adapter.folder)
    if quantization is not None:
        return _Training(str(quantization), adapter, quantization)
    summary = load_json_or_empty(adapter.folder / RUN_SUMMARY)
    if not summary.get("base_is_quantized"):
        return None
    return _Training(str(summary.get("quantization") or "another checkpoint"), adapter, None)


def _measure(plan: MergePlan, training: _Training, folder: Path) -> str:
    quantization = training.quantization
    if quantization is not None and not quantization.is_packed:
        read = _rounding_by(quantization, plan.fold.base)
    else:
        read = _stored_with(training.adapter, plan).read
    form = TrainedForm(plan.fold.base, read, str(plan.fold_config["model_type"]))
    prompts = prompt_ids(folder, plan.vocab_size)
    with steps_bar("comparing") as show:
        result = verify_merge(form, plan.fold_config, plan.adapters, folder, prompts, show)
    return (
        f"against the quantised form: weights differ by {form.relative_error():.2%}, logits by up to "
        f"{result.largest_difference:.2g}, same next token at {result.equal_tokens:.1%} of {result.tokens} tokens"
    )


def _rounding_by(quantization: Quantization, base: TensorSource) -> Read:
    """Return a function that rounds weights of the base as bitsandbytes does while it loads a model."""
    if quantization.method == "int8":

        def read_int8(name: str) -> Tensor:
            weight = base.read(name).to(torch.float16).float()
            scales = weight.abs().amax(1).clamp(min=2**-24)
            return dequantize_8bit((weight * (127 / scales)[:, None]).round_(), scales)

        return read_int8
    check_bitsandbytes(f"the comparison with {quantization}")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def read_4bit(name: str) -> Tensor:
        weight = base.read(name)
        # As one long row: on a CPU bitsandbytes misreads rows that are not whole blocks.
        row = weight.contiguous().view(1, -1)
        packed, state = quantize_4bit(row, blocksize=64, compress_statistics=True, quant_type=quantization.method)
        state.dtype = torch.float32
        return dequantize_4bit(packed, state).to(torch.float32).view(weight.shape)

    return read_4bit


def _stored_with(adapter: Adapter, plan: MergePlan) -> TensorSource:
    """Open the quantised checkpoint that an adapter was trained on, in the layout of the merge.

    Raises:
        ConfigError: it cannot be read on this machine; the message contains no path, because the model card quotes it.
    """
    recorded = load_json_or_empty(adapter.folder / RUN_SUMMARY).get("base_fingerprint")
    try:
        base = find_base(None, adapter.folder, adapter.config)
        if recorded not in (None, fingerprint(base)):
            raise ConfigError(f"{base} is not the checkpoint that {adapter.folder} was trained on")
        source = open_dequantized(base, torch.float16)
        return convert_model(source, load_json(base / "config.json"), layout_of_config(plan.fold_config))[0]
    except ConfigError as error:
        logger.info("%s", error)
        raise ConfigError("the checkpoint of its training is not on this machine") from error
