"""What a run can know at its end: which training samples its model reproduces, and whether its change is large enough.

All of it is measured after the result has been saved, on rank 0 alone, without random numbers and without a collective.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from checkpoints.kept import Kept
from checkpoints.model_config import dtype_name
from checkpoints.training_samples import TrainingSample
from data_utils.examples import ExampleSet
from loading.initial_values import begins_as_weights, change_of
from loading.sharding import is_sharded
from training.samples import choose_samples
from training.trainer import QwenTrainer

logger = logging.getLogger(__name__)

_DEFAULT_SAMPLES = 8  # if none are kept in a file
_SHARE_OF_TIME, _LEAST_SECONDS = 0.1, 5.0  # of the run: samples that would take longer are left out
_LAYERS, _ROWS = 24, 64  # of an adapter, in which its change is measured
_FEW_LOSSES = 6  # logged values that say nothing about noise


def measure_learnt(trainer: QwenTrainer, examples: ExampleSet, count: int, seconds: float) -> dict[str, Any]:
    """Return the figures of ``run_summary.json`` on what was learnt.

    Args:
        count: kept training samples; for 0 others are chosen, which are not written.
        seconds: of training; the measurement takes a tenth of it, or a few seconds.
    """
    # Compiling it again, for the length of each sample, would take minutes.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if is_sharded(model):
        return {"skipped": "each rank holds only a part of the weights"}
    samples = choose_samples(examples, count or _DEFAULT_SAMPLES, trainer.args.seed).samples
    figures = measure_samples(model, samples, max(_LEAST_SECONDS, _SHARE_OF_TIME * seconds))
    if change := measure_change(model, trainer.checkpoint.dtype):
        figures["change"] = change
    return figures


@torch.inference_mode()
def measure_samples(model: nn.Module, samples: Sequence[TrainingSample], seconds: float) -> dict[str, Any]:
    """Predict each target of the samples from the tokens before it.

    If the most likely token is the target everywhere, greedy decoding repeats the answers.

    Returns:
        ``samples``, of them ``reproduced``; ``targets``, of them ``correct``; and ``loss``, the mean over the targets.
        Samples after ``seconds`` are left out.
    """
    was_training, device, end = model.training, next(model.parameters()).device, time.monotonic() + seconds
    rows: list[tuple[int, int, float]] = []
    model.eval()
    try:
        for sample in samples:
            labels = torch.tensor([sample.labels], device=device)
            output = model(input_ids=torch.tensor([sample.ids], device=device), labels=labels, loss_only=True)
            targets = sum(label >= 0 for label in sample.labels[1:])
            rows.append((targets, int(output.num_correct), float(output.loss)))
            if time.monotonic() > end:
                break
    finally:
        model.train(was_training)
    total = sum(targets for targets, _, _ in rows)
    return {
        "samples": len(rows),
        "reproduced": sum(correct == targets for targets, correct, _ in rows),
        "targets": total,
        "correct": sum(correct for _, correct, _ in rows),
        "loss": sum(targets * loss for targets, _, loss in rows) / max(total, 1),
    }


@torch.inference_mode()
def measure_change(model: nn.Module, dtype: torch.dtype) -> dict[str, Any] | None:
    """Compare the change by an adapter with the distance of neighbouring values of a 16-bit type, in some rows.

    Returns:
        ``dtype``; ``median_steps``, the median of |change| / distance; and ``kept_by_nearest``, the share of the change
        that is left when each sum is rounded to its nearest value: <applied, learnt> / <learnt, learnt>. ``None``
        without an adapter that can be merged into weights of 16 bits.
    """
    if not isinstance(model, PeftModel) or dtype not in (torch.bfloat16, torch.float16):
        return None
    layers = [*_lora_layers(model)]
    steps, kept = list[Tensor](), Kept()
    for layer in layers[:: max(1, len(layers) // _LAYERS)]:
        weight, change = _some_rows(layer, dtype)
        steps.append((change.abs() / _distance(weight, dtype)).flatten())
        exact = weight + change
        kept = Kept.sum([kept, Kept.of(weight, exact, exact.to(dtype))])
    if not kept.learnt:
        return None
    median = float(torch.cat(steps).median())
    return {"dtype": dtype_name(dtype), "median_steps": median, "kept_by_nearest": kept.share}


def _lora_layers(model: nn.Module) -> Iterator[Any]:
    """Yield adapted linear layers whose merged weights are floats: no quantised ones, no DoRA."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and len(layer.lora_A) and not len(layer.lora_magnitude_vector):
            weight = getattr(layer.get_base_layer(), "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
                yield layer


def _some_rows(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows of a layer's base weight and of its change, both as ``dtype`` holds them, in float32."""
    weight, [name] = layer.get_base_layer().weight, layer.active_adapters
    rows = slice(None, None, max(1, len(weight) // _ROWS))
    matrices = (layer.lora_A[name].weight, layer.lora_B[name].weight)
    first, second = change_of(layer, name) if begins_as_weights(layer, name) else matrices
    change = layer.scaling[name] * (second[rows].to(dtype).float() @ first.to(dtype).float())
    return weight.detach()[rows].to(dtype).float(), change


def _distance(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance from each value to the next larger one that ``dtype`` has."""
    info = torch.finfo(dtype)
    return torch.exp2(torch.frexp(values.abs().clamp(min=info.tiny)).exponent - 1.0) * info.eps


def describe_learnt(figures: dict[str, Any]) -> list[str]:
    """Return the figures of ``measure_learnt`` as lines for the log."""
    if not figures:
        return []
    if "skipped" in figures:
        return [f"not compared with training samples: {figures['skipped']}"]
    right = figures["correct"] / max(figures["targets"], 1)
    lines = (
        ["no training sample is short enough to be compared"]
        if not figures["samples"]
        else [
            f"{figures['reproduced']} of {figures['samples']} training samples reproduced (greedy); "
            f"{right:.1%} of their tokens right, loss {figures['loss']:.3g}"
        ]
    )
    if change := figures.get("change"):
        lines.append(
            f"the median change of a weight is {_plain(change['median_steps'])} times the distance of neighbouring "
            f"{change['dtype']} values; rounding to nearest would keep {change['kept_by_nearest']:.0%} of the change"
        )
    return lines


def _plain(number: float) -> str:
    """Return a number with two significant digits, never as a power of ten."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}" if number >= 1e-4 else "less than 0.0001"


def warn_of_little(figures: dict[str, Any], losses: Sequence[float], learning_rate: float) -> None:
    """Warn if the loss did not fall, or if the adapter's change is small beside the steps of the result's type."""
    if fault := find_no_fall(losses):
        logger.warning("Nothing was learnt: %s. Raise --learning_rate %g, or train longer", fault, learning_rate)
    change = figures.get("change")
    if change and change["median_steps"] < 0.5:
        logger.warning(
            "The adapter's change is small: its median is %.2g of the step between values of %s, so a merge that "
            "rounds to nearest keeps %.0f %% of it. --rounding dithered and --dtype fp32 of merge_lora.py keep all of "
            "it, as does the adapter; a larger --learning_rate or --lora_alpha, or more epochs enlarge it",
            change["median_steps"], change["dtype"], 100 * change["kept_by_nearest"],
        )  # fmt: skip


def find_no_fall(losses: Sequence[float]) -> str | None:
    """Return a sentence if the last third of logged losses is neither below the first third nor below the first loss.

    Below means by more than a hundredth, and by more than twice the standard error of the difference, or the standard
    deviation for the single value.
    """
    if len(losses) < _FEW_LOSSES:
        return None
    part = len(losses) // 3
    first, last = losses[:part], losses[-part:]
    start, end = statistics.mean(first), statistics.mean(last)
    noise = math.sqrt((statistics.variance(first) + statistics.variance(last)) / part)
    if start - end > max(2 * noise, start / 100) or losses[0] - end > max(2 * statistics.stdev(last), start / 100):
        return None
    return (
        f"the loss is {start:.4g} in the first third of the run and {end:.4g} in the last, a difference of less than "
        f"1 % or within its noise ({noise:.2g})"
    )
