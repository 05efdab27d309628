"""Merges into other weights than those of the training: what a quantised base computed, against what is written.

Q-LoRA trains an adapter beside quantised weights. Merged into the unquantised ones, the adapter is the same and the
weights beside it are not: the result is correct as a merge, and answers differently from what was trained. How much is
measured here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints.adapter import Adapter
from checkpoints.dequantized_reader import open_dequantized
from checkpoints.files import load_json_or_empty
from checkpoints.model_config import Quantization, load_base_quantization
from checkpoints.names import RUN_SUMMARY
from checkpoints.shards import fingerprint
from checkpoints.source import TensorSource
from checkpoints.whole import load_text_config
from errors import ConfigError
from export.inputs import find_base
from export.layouts.convert import convert_tensors
from export.layouts.qwen2_names import layout_of_config
from export.merging import MergePlan
from export.progress import steps_bar
from export.quantized_form import TrainedForm, as_quantized
from export.verify.behaviour import Comparison, compare_answers
from export.verify.samples import choose_samples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Training:
    """How a base was quantised in the training of an adapter: known to the library, or only by its name."""

    title: str
    adapter: Adapter
    quantization: Quantization | None

    @property
    def can_be_matched(self) -> bool:
        """Whether the same weights can be computed from the unquantised ones."""
        return self.quantization is not None and not self.quantization.is_packed

    @property
    def unmeasured(self) -> str:
        """Why the weights of the training could not be had, for readers on other machines."""
        if self.can_be_matched:
            return "bitsandbytes was not installed"
        return "the checkpoint of its training was not at hand"


def compare_with_training(plan: MergePlan, folder: Path, measures: bool) -> list[str]:
    """Describe, and log as warnings, how a merged folder differs from what its adapters were trained as.

    Args:
        measures: measure the differences of weights and logits.

    Returns:
        A line for each form of the base that an adapter was trained beside; none if it was the one merged into.
    """
    if plan.base.quantization is not None or plan.matched is not None:
        return []
    lines = []
    trainings = (_training_of(each.adapter) for each in plan.adapters)
    for training in {each.title: each for each in trainings if each is not None}.values():
        line = (
            f"{training.adapter.folder.name} was trained beside weights quantised as {training.title}, and this model "
            f"has the unquantised weights of {plan.base.folder.name}: it answers differently from what was trained"
        )
        said = published = "not measured: --no_verify"
        try:
            if measures:
                said = published = _measure(plan, training, folder)
        except ConfigError as error:  # may name paths and commands of this machine
            said, published = f"not measured: {error}", f"not measured: {training.unmeasured}"
        lines.append(f"{line} ({published})")
        fix = ". --match_quantised_base merges into the weights of the training" if training.can_be_matched else ""
        logger.warning("%s (%s)%s", line, said, fix)
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
    base, model_type = plan.fold.base, str(plan.fold_config["model_type"])
    if training.can_be_matched:
        assert quantization is not None
        form = as_quantized(base, quantization, model_type)
    else:
        form = TrainedForm(base, _stored_with(training.adapter, plan).read, model_type)
    samples = choose_samples(plan.adapters, folder, plan.vocab_size)
    comparison = Comparison(form, plan.fold_config, plan.adapters, folder, samples)
    with steps_bar("comparing") as show:
        result = compare_answers(comparison, show)
    weights = f"weights differ from the quantised form by {form.relative_error():.2%}"
    if not result.tokens:
        return weights
    return (
        f"{weights}; on {result.samples} the loss is {result.merged_loss:.3f} instead of {result.adapter_loss:.3f}, "
        f"same next token at {result.merged_equal:.1%} of {result.tokens} tokens"
    )


def _stored_with(adapter: Adapter, plan: MergePlan) -> TensorSource:
    """Open the quantised checkpoint that an adapter was trained on, in the layout of the merge.

    Raises:
        ConfigError: it is not on this machine, or cannot be read.
    """
    base = find_base(None, adapter.folder, adapter.config)
    recorded = load_json_or_empty(adapter.folder / RUN_SUMMARY).get("base_fingerprint")
    if recorded not in (None, fingerprint(base)):
        raise ConfigError(f"{base} is not the checkpoint that {adapter.folder} was trained on")
    source = open_dequantized(base, torch.float16)
    return convert_tensors(source, load_text_config(base), layout_of_config(plan.fold_config))
