"""Verify a merged folder: its weights against base + adapters, its config, and its answers.

Three things are compared in one pass over the layers, with at most one layer of base and folder in memory:

- every written tensor with the base's and the adapters' (``export.verify.weights``);
- the stages of the folder's config with those of the base's if they differ, on the same weights and states;
- what base, base + adapters and folder predict for a few samples (``export.verify.behaviour``).

The first two decide whether the merge is correct. The third says what its rounding did to the answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from checkpoints.model_config import Rounding, dtype_name
from checkpoints.source import TensorSource, main_dtype, row_blocks
from errors import ConfigError
from export.layouts.convert import convert_tensors
from export.layouts.qwen2_names import layout_of_config
from export.verify.behaviour import NOTICEABLE_LOSS, Behaviour, Comparison
from export.verify.reference import AdaptedParameters
from export.verify.weights import SUMMED, TensorCheck, same_bits
from qwen_model.architectures import ARCHITECTURES, HEAD_WEIGHT
from qwen_model.block_runner import run_block

CONFIG_TOKENS = 16
"""Tokens of the first sample on which the stages of two configs are compared."""

CONFIG_SHARE = 1e-3
"""Allowed difference of a stage's output under two configs, as a share of what the stage adds, for float32."""

STATES_SHARE = 1e-5
"""The same, as a share of the states that a block adds to."""


@dataclass(frozen=True)
class Verification:
    """Result of the comparison of a merged folder.

    Attributes:
        tensors: number of tensors compared.
        kept: share of the adapters' change that is in the written weights; 1 if they change nothing.
        dtype: dtype of most of the folder's weights.
        rounding: with which changed values were rounded to 16 bits.
        behaviour: of the folder beside base + adapters; ``None`` if its tensors do not fit its config.
        faults: differences that rounding cannot cause; empty if the merge is correct.
    """

    tensors: int
    kept: float
    dtype: torch.dtype
    rounding: Rounding
    behaviour: Behaviour | None
    faults: list[str] = field(default_factory=list)

    @property
    def warning(self) -> str:
        """What a correct merge lost by its dtype, and the remedy; empty if it is not noticeable."""
        if self.faults or self.behaviour is None or (lost := self.behaviour.lost_share) < NOTICEABLE_LOSS:
            return ""
        return (
            f"the merged model gives back {1 - lost:.0%} of what the adapter learnt on its training samples (loss "
            f"{self.behaviour.merged_loss:.3f} instead of {self.behaviour.adapter_loss:.3f}; untuned "
            f"{self.behaviour.base_loss:.3f}): {dtype_name(self.dtype)} holds {self.kept:.0%} of the adapter's change. "
            f"Merge again {'without --rounding nearest, or ' if self.rounding == 'nearest' else ''}with --dtype fp32"
        )


def describe(verification: Verification) -> str:
    """Describe a result in a few lines for a user."""
    faults = verification.faults
    if not faults:
        dtype = dtype_name(verification.dtype)
        result = f"verified: {verification.tensors} tensors are base + adapter, rounded to {dtype}"
        return "\n".join([result, *([f"  {verification.behaviour}"] if verification.behaviour else [])])
    lines = [f"DIFFERS: {len(faults)} of {verification.tensors} tensors or stages"]
    lines += [f"  {fault}" for fault in faults[:5]]
    if len(faults) > 5:
        lines.append(f"  and {len(faults) - 5} more")
    return "\n".join(lines)


def check_verifiable(model_type: str) -> None:
    """Raise ``ConfigError`` for a family whose blocks cannot be run one at a time."""
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ConfigError(
            f"a model of type {model_type!r} cannot be verified, only {known}",
            "Add --no_verify to merge without the comparison",
        )


@torch.no_grad()
def verify_merge(
    comparison: Comparison, rounding: Rounding, on_progress: Callable[[int, int], object] = lambda done, total: None
) -> Verification:
    """Compare a merged folder with its base and the adapters that were merged.

    Args:
        rounding: with which changed values were rounded to 16 bits.
        on_progress: called with the number of finished steps (about one per layer) and their total.
    """
    faults = comparison.result.faults(comparison.written)
    reference, result = comparison.reference.sizes, comparison.result.sizes
    if reference != result:
        faults.append(f"vocabulary, width and number of layers are {result}, the base's {reference}")
    if faults:
        return Verification(len(comparison.result.shapes), 1.0, main_dtype(comparison.written), rounding, None, faults)
    return _Verifier(comparison, rounding).run(on_progress)


class _Verifier:
    """Compares weights, configs and answers, stage by stage."""

    def __init__(self, comparison: Comparison, rounding: Rounding) -> None:
        self._all, self._rounding = comparison, rounding
        layout = layout_of_config(dict(comparison.base_config))
        written = convert_tensors(comparison.written, comparison.written_config, layout)
        tied_to = comparison.reference.embedding if comparison.result.tied_to else None
        # The written tensors by the names of the base's layout.
        self._written = AdaptedParameters(written, (), tied_to, comparison.keeps_bfloat16)
        self._tensors, self._learnt, self._lost = 0, 0.0, 0.0
        self._faults: list[str] = []

    def run(self, on_progress: Callable[[int, int], object]) -> Verification:
        all_, steps = self._all, len(self._all.stages) + 2
        self._check(all_.reference.embedding)
        streams = all_.start()
        same_states = None
        if all_.reference.settings != all_.result.settings:
            same_states = _SameStates(all_, self._written, streams.states[1])
        on_progress(1, steps)
        for index, stage in enumerate(all_.stages):
            all_.hold(stage)
            for name in all_.reference.tensors_of(stage):
                self._check(name)
            if same_states is not None:
                self._faults += same_states.faults(index, streams.states[1])
            streams.run_stage(index)
            on_progress(index + 2, steps)
        behaviour = all_.behaviour(streams)
        self._check_other_parts()
        if not (all_.reference.tied_to and all_.result.tied_to):
            self._check(HEAD_WEIGHT)
        if not self._faults and math.isfinite(behaviour.adapter_loss) and not math.isfinite(behaviour.merged_loss):
            self._faults.append("its predictions are not finite")
        on_progress(steps, steps)
        kept = 1 + self._lost / self._learnt if self._learnt else 1.0
        return Verification(self._tensors, kept, main_dtype(all_.written), self._rounding, behaviour, self._faults)

    def _check_other_parts(self) -> None:
        """Compare what base and folder have beside their text models: no value may change."""
        if self._all.other_parts is None:
            return
        base, written = self._all.other_parts[0].tensors, self._all.other_parts[1]
        if different := set(base.names()) ^ set(written.names()):
            self._faults.append(f"{min(different)}: only in {'the base' if min(different) in base else 'the folder'}")
        for name in (name for name in base.names() if name in written):
            self._tensors += 1
            if _differ(base, written, name):
                self._faults.append(f"{name}: differs from the base's, and is not of the text model")

    def _check(self, name: str) -> None:
        """Compare a tensor, named as in the base's layout."""
        check = check_tensor(name, self._all.adapted, self._written, self._rounding)
        self._faults += check.faults()
        self._tensors += 1
        learnt, lost = check.change()
        self._learnt += learnt
        self._lost += lost


def check_tensor(name: str, adapted: AdaptedParameters, written: AdaptedParameters, rounding: Rounding) -> TensorCheck:
    """Compare a written tensor with base + adapters.

    Args:
        written: the folder's tensors by the names of the base's layout.
    """
    stored, written_name = adapted.stored_name(name), written.stored_name(name)
    shape = adapted.source.shape(stored)
    step = max(1, math.prod(shape) // SUMMED)
    check = TensorCheck(name, written.source.dtype(written_name), rounding, step)
    if len(shape) != 2:
        values = adapted.source.read(stored), adapted.vector(name), written.source.read(written_name)
        check.compare_vector(*(each.flatten() for each in values))
        return check
    for start, stop in row_blocks(*shape):
        rows = adapted.source.rows(stored, start, stop)
        check.compare(rows, adapted.changes(name, start, stop), written.source.rows(written_name, start, stop), start)
    return check


def _differ(first: TensorSource, second: TensorSource, name: str) -> bool:
    if (first.shape(name), first.dtype(name)) != (second.shape(name), second.dtype(name)):
        return True
    return not all(map(same_bits, first.blocks(name), second.blocks(name)))


class _SameStates:
    """The stages of the base's config and of the folder's, with the same written weights and input states."""

    def __init__(self, comparison: Comparison, written: AdaptedParameters, states: Tensor) -> None:
        self._models = ((comparison.reference, written), (comparison.result, comparison.merged))
        self._length = min(CONFIG_TOKENS, states.shape[1], len(comparison.samples.items[0].ids))
        states = states[:1, : self._length]
        mask = torch.ones(states.shape[:2], dtype=torch.long)
        self._arguments = [model.stage_arguments(states, mask) for model, _ in self._models]

    def faults(self, index: int, states: Tensor) -> list[str]:
        """Run a stage of both on the first tokens of ``states`` [P, T, C]; describe a difference."""
        states = states[:1, : self._length]
        outputs = []
        for (model, parameters), arguments in zip(self._models, self._arguments, strict=True):
            stage = model.load_stage(model.stages[index], parameters)
            outputs.append(run_block(stage, states, arguments[index]))
        expected, output = outputs
        difference = _rms(output - expected)
        allowed = CONFIG_SHARE * _rms(expected - states) + STATES_SHARE * _rms(states)
        if difference <= allowed or not expected.isfinite().all():
            return []
        name = self._models[1][0].stages[index]
        return [
            f"{name}: config.json gives other states than the base's (off by {difference:.2g}, {allowed:.2g} allowed)"
        ]


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
