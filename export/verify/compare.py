"""Compare a merged folder with its base and adapters, block by block, so that no model is in memory as a whole.

Three streams of states pass from the embedding to the logits, in float32: those of the base with its adapters unmerged
(``export.verify.reference``), of the merged folder, and of the first model with weights rounded to the dtypes of the
folder. The difference of the third from the first is what rounding explains. Besides the final logits, every block is
compared on its own, given the reference's input, so that one wrong tensor is located.

At most one block of each model and the states are in memory.

Shapes: P prompts, T tokens of the longest, N tokens in total, C hidden size, V vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from checkpoints.files import load_json
from checkpoints.fold import WeightedAdapter
from checkpoints.shards import open_checkpoint
from checkpoints.source import TensorSource, row_blocks
from errors import ConfigError
from export.verify.layered_model import LayeredModel, round_weights
from export.verify.tolerance import END_FACTOR, END_FLOOR, PartCheck, RunningArgmax, States
from qwen_model.architectures import ARCHITECTURES, HEAD, HEAD_WEIGHT
from qwen_model.block_runner import run_block


@dataclass(frozen=True)
class Verification:
    """Result of the comparison of a merged folder.

    Attributes:
        largest_difference: largest difference of logits between the merged folder and base + adapters; infinite if
            the folder's tensors do not fit its config.
        largest_explained: the same between base + adapters with weights rounded to ``dtype`` and unrounded.
        equal_tokens, equal_explained: shares of positions with the same most likely next token, in the same two pairs.
        tokens, prompts: numbers compared.
        dtype: dtype of most of the folder's weights.
        faults: differences beyond the bounds, by parts of the merged folder; empty if the merge is correct.
    """

    largest_difference: float
    largest_explained: float
    equal_tokens: float
    equal_explained: float
    tokens: int
    prompts: int
    dtype: torch.dtype
    faults: list[str] = field(default_factory=list)


def describe(verification: Verification) -> str:
    """Describe a result in a few lines for a user."""
    dtype = str(verification.dtype).removeprefix("torch.")
    lines = [
        f"{'DIFFERS' if verification.faults else 'verified'}: {verification.prompts} prompts, "
        f"{verification.tokens} tokens: largest logit difference {verification.largest_difference:.2g} "
        f"(rounding to {dtype} explains {verification.largest_explained:.2g}); same next token "
        f"at {100 * verification.equal_tokens:.1f} % ({100 * verification.equal_explained:.1f} %)"
    ]
    shown = verification.faults[:5]
    lines += [f"  {fault}" for fault in shown]
    if more := len(verification.faults) - len(shown):
        lines.append(f"  and {more} more")
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
    base: TensorSource,
    base_config: Mapping[str, Any],
    adapters: Sequence[WeightedAdapter],
    merged: Path,
    token_ids: Sequence[Sequence[int]],
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Verification:
    """Compare a merged folder with its base and the adapters that were merged.

    Args:
        base: the base's tensors by the names of its layout, dequantised.
        base_config: contents of its config.json.
        adapters: in the base's layout.
        merged: the merged folder, in any layout.
        token_ids: the prompts, each of at least one id; cut to the length that both models were trained for.
        on_progress: called with the number of finished steps (about one per layer) and their total.

    Raises:
        ConfigError: tensors of the base, or files of the folder, are missing.
    """
    reference = LayeredModel(base, base_config, adapters)
    result = LayeredModel(open_checkpoint(merged), load_json(merged / "config.json"))
    if faults := reference.faults():
        raise ConfigError(f"the base: {faults[0]}", "Copy or download its config.json and weights again")
    limit = min(reference.trained_length, result.trained_length)
    prompts = [list(ids[:limit]) for ids in token_ids]
    faults = result.faults()
    if reference.sizes != result.sizes:
        faults.append(f"vocabulary, width and number of layers are {result.sizes}, the base's {reference.sizes}")
    if faults:
        return Verification(math.inf, 0.0, 0.0, 1.0, sum(map(len, prompts)), len(prompts), result.dtype, faults)
    return _Comparison(reference, result, prompts).run(on_progress)


class _Comparison:
    """Passes the prompts through both models, stage by stage, and collects the faults.

    Attributes:
        ids: [P, T], padded on the right, where causal attention of real tokens does not reach.
        is_real: [P, T], False for padding.
    """

    def __init__(self, reference: LayeredModel, result: LayeredModel, prompts: Sequence[Sequence[int]]) -> None:
        self.reference, self.result = reference, result
        rows = [torch.tensor(prompt) for prompt in prompts]
        self.ids = pad_sequence(rows, batch_first=True)
        self.is_real = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        self.faults: list[str] = []

    def run(self, on_progress: Callable[[int, int], object]) -> Verification:
        steps = len(self.reference.stages) + 2
        states = self._embed()
        on_progress(1, steps)
        mask = self.is_real.long()
        reference_arguments = self.reference.stage_arguments(states.reference, mask)
        result_arguments = self.result.stage_arguments(states.merged, mask)
        for index, arguments in enumerate(zip(reference_arguments, result_arguments, strict=True)):
            states = self._run_stage(index, states, *arguments)
            on_progress(index + 2, steps)
        verification = self._compare_logits(States(*(each[self.is_real] for each in states)))
        on_progress(steps, steps)
        return verification

    def _embed(self) -> States:
        """Return the embedded prompts, [P, T, C]; compare all rows of the two embeddings."""
        (name, merged_name), (rows, width, _) = (self.reference.embedding, self.result.embedding), self.reference.sizes
        check = PartCheck(merged_name.removesuffix(".weight"), "row")
        states = States(*(torch.empty(*self.ids.shape, width) for _ in range(3)))
        for start, stop in row_blocks(rows, width):
            values = self.reference.parameters.embedding_rows(name, start, stop)
            rounded = values.to(self.result.source.dtype(merged_name)).to(torch.float32)
            block = States(values, self.result.parameters.stored_rows(merged_name, start, stop), rounded)
            check.compare(States(*(each.T for each in block)), values.T, start)
            in_block = (self.ids >= start) & (self.ids < stop)
            for target, source in zip(states, block, strict=True):
                target[in_block] = source[self.ids[in_block] - start]
        self.faults += check.faults()
        return states

    def _run_stage(
        self,
        index: int,
        states: States,
        reference_arguments: Mapping[str, Any],
        result_arguments: Mapping[str, Any],
    ) -> States:
        """Return the states after a block, or after the final norm; compare its outputs for the reference's input."""
        name = self.result.stages[index]
        stage = self.reference.load_stage(self.reference.stages[index])
        reference = run_block(stage, states.reference, reference_arguments)
        result_stage = self.result.load_stage(name)
        merged = run_block(result_stage, states.merged, result_arguments)
        merged_output = run_block(result_stage, states.reference, result_arguments)
        del result_stage
        round_weights(stage, self.result.dtypes(name))
        rounded = run_block(stage, states.rounded, reference_arguments)
        rounded_output = run_block(stage, states.reference, reference_arguments)
        is_block = index < len(self.result.stages) - 1
        contribution = reference - states.reference if is_block else reference
        check = PartCheck(name, "channel")
        outputs = States(reference, merged_output, rounded_output)
        check.compare(States(*(each[self.is_real] for each in outputs)), contribution[self.is_real])
        self.faults += check.faults()
        return States(reference, merged, rounded)

    def _compare_logits(self, states: States) -> Verification:
        """Compare the heads and the logits of states [N, C], a slice of the vocabulary at a time."""
        check = PartCheck(HEAD, "row")
        best = [RunningArgmax(len(each)) for each in states]
        largest = torch.zeros(3)  # of merged - reference, rounded - reference, and the reference itself
        dtype = {2: self.result.source.dtype(self.result.parameters.stored_name(HEAD_WEIGHT))}
        rows, width, _ = self.reference.sizes
        for start, stop in row_blocks(rows, width):
            head = self.reference.parameters.linear_rows(HEAD_WEIGHT, start, stop)
            result_head = self.result.parameters.linear_rows(HEAD_WEIGHT, start, stop)
            reference, merged = head(states.reference), result_head(states.merged)
            merged_output = result_head(states.reference)
            round_weights(head, dtype)
            rounded, rounded_output = head(states.rounded), head(states.reference)
            check.compare(States(reference, merged_output, rounded_output), reference, start)
            differences = (merged - reference, rounded - reference, reference)
            largest = torch.maximum(largest, torch.stack([each.abs().max() for each in differences]))
            for argmax, logits in zip(best, (reference, merged, rounded), strict=True):
                argmax.update(logits, start)
        self.faults += check.faults()
        difference, explained, highest = largest.tolist()
        if not difference <= (bound := END_FACTOR * explained + END_FLOOR * highest):  # NaN is a fault
            self.faults.append(f"logits: off by up to {difference:.2g}, allowed {bound:.2g}")
        return Verification(
            largest_difference=difference,
            largest_explained=explained,
            equal_tokens=best[0].agreement(best[1]),
            equal_explained=best[0].agreement(best[2]),
            tokens=len(states.reference),
            prompts=len(self.ids),
            dtype=self.result.dtype,
            faults=self.faults,
        )
