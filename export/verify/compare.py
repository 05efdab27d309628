"""Base + adapters against the merged folder, layer by layer, so that neither model is ever whole in memory.

Three streams of states go from the embedding to the logits, all in float32: that of the base with its adapters beside
it (``export.verify.reference``), that of the merged folder, and that of the first one's weights rounded to what the
folder is stored in. What the third differs by from the first is what rounding explains. Besides the ends every
block is looked at on its own, given the same input as the base's, so that one wrong tensor shows where it is.

In memory are at most one block of each model and the states.

Shapes: P prompts, T tokens of the longest, N tokens of all, C hidden size, V vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from checkpoints.files import load_json
from checkpoints.fold import WeightedAdapter
from checkpoints.shards import open_checkpoint
from checkpoints.source import TensorSource, row_blocks
from errors import ConfigError
from export.verify.layered_model import LayeredModel, round_to
from export.verify.reference import HEAD_WEIGHT
from qwen_model.block_runner import HEAD, PLACES, run_block

FACTOR = 2.0
"""How many times what rounding explains a channel of a block's output, or a row of embedding or head, may be off.

An honest merge rounds the very same numbers, so it is off by just as much (measured: up to 1.1 times). Only where two
orders of summation put a number on different sides of a tie it differs: that changes the sign of this number's error,
not its size."""

SHARE = 0.5
"""How far from the rounded weights a part may be on the whole, as a share of what rounding explains.

For an honest merge only those few numbers count (measured: up to 0.14, where a layer has 32 channels)."""

FLOOR = 1e-4
"""What float32 may do besides, as a share of what the part is there for (measured: 3e-7, and 4e-5 where attention is
so sharp that it makes errors grow)."""

STATES_FLOOR = 1e-6
"""The same as a share of the states that a block adds to: float32 rounds their sums."""

END_FACTOR = 4.0
END_FLOOR = 1e-3
"""The same for the logits' largest difference, and of the largest logit: through many blocks small errors grow."""


@dataclass(frozen=True)
class Verification:
    """What the comparison of a merged folder found.

    Attributes:
        largest_difference, largest_explained: between logits of the merged folder and of base + adapters, and of
            base + adapters rounded to ``dtype`` and not; infinite where the folder's tensors do not fit its config.
        equal_tokens, equal_explained: the shares of tokens after which both hold the same next one most likely.
        tokens, prompts: how many were compared.
        dtype: what most of the folder is stored in.
        faults: what is beyond the bounds, by the names of the merged folder's parts; empty if it is what it should be.
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
    """The result in a few lines for a user."""
    each, dtype = verification, str(verification.dtype).removeprefix("torch.")
    found = "DIFFERS" if each.faults else "verified"
    lines = [
        f"{found}: {each.prompts} prompts, {each.tokens} tokens: largest logit difference "
        f"{each.largest_difference:.2g} (rounding to {dtype} explains {each.largest_explained:.2g}); same next token "
        f"at {100 * each.equal_tokens:.1f} % ({100 * each.equal_explained:.1f} %)"
    ]
    shown = each.faults[:5]
    lines += [f"  {fault}" for fault in shown]
    if more := len(each.faults) - len(shown):
        lines.append(f"  and {more} more")
    return "\n".join(lines)


def check_verifiable(model_type: str) -> None:
    """Raise ``ConfigError`` for a family whose blocks are not known here."""
    if model_type not in PLACES:
        known = ", ".join(sorted(PLACES))
        raise ConfigError(
            f"a model of the type {model_type!r} cannot be verified, only {known}",
            "Add --no_verify to merge all the same",
        )


@torch.no_grad()
def verify_merge(
    base: TensorSource,
    base_config: Mapping[str, Any],
    adapters: Sequence[WeightedAdapter],
    merged: Path,
    token_ids: Sequence[Sequence[int]],
    on_progress: Callable[[int, int], object] = lambda done, of: None,
) -> Verification:
    """Compare a merged folder with its base and the adapters that were merged.

    Args:
        base: its tensors by the names of its layout; those of a quantised base dequantised.
        base_config: its config.json.
        adapters: in the base's layout.
        merged: the folder, in any layout.
        token_ids: the prompts, each of at least one id; cut to what both models were trained for.
        on_progress: called with the number of steps (about one a layer) that are done, and of all.
    Raises:
        ConfigError: tensors of the base, or files of the folder, that are missing.
    """
    reference = LayeredModel(base, base_config, adapters)
    result = LayeredModel(open_checkpoint(merged), load_json(merged / "config.json"))
    if faults := reference.faults():
        raise ConfigError(f"the base: {faults[0]}", "Copy or download its config.json and weights again")
    limit = min(reference.longest, result.longest)
    prompts = [list(ids[:limit]) for ids in token_ids]
    faults = result.faults()
    if reference.sizes != result.sizes:
        faults.append(f"vocabulary, width and number of layers are {result.sizes}, the base's {reference.sizes}")
    if faults:
        return Verification(math.inf, 0.0, 0.0, 1.0, sum(map(len, prompts)), len(prompts), result.dtype, faults)
    return _Walk(reference, result, prompts).run(on_progress)


class _Streams(NamedTuple):
    """States of the base with adapters, of the merged folder, and of the first one's weights rounded."""

    reference: Tensor
    merged: Tensor
    rounded: Tensor


class _Walk:
    """Two models side by side, from the embedding to the logits."""

    def __init__(self, reference: LayeredModel, result: LayeredModel, prompts: Sequence[Sequence[int]]) -> None:
        self.reference, self.result = reference, result
        rows = [torch.tensor(prompt) for prompt in prompts]
        # Padding stands on the right, where no real token looks.
        self.ids = pad_sequence(rows, batch_first=True)
        self.is_real = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        self.faults: list[str] = []

    def run(self, on_progress: Callable[[int, int], object]) -> Verification:
        steps = len(self.reference.stages) + 2
        streams = self._embed()
        on_progress(1, steps)
        calls = [
            model.calls(states, self.is_real.long())
            for model, states in ((self.reference, streams.reference), (self.result, streams.merged))
        ]
        for index, (ours, theirs) in enumerate(zip(*calls, strict=True)):
            streams = self._pass_stage(index, streams, ours, theirs)
            on_progress(index + 2, steps)
        verification = self._compare_logits(_Streams(*(states[self.is_real] for states in streams)))
        on_progress(steps, steps)
        return verification

    def _embed(self) -> _Streams:
        """The tokens' rows; every row of both embeddings is compared."""
        (name, other), (rows, width, _) = (self.reference.embedding, self.result.embedding), self.reference.sizes
        check = _Check(other.removesuffix(".weight"), "row")
        streams = _Streams(*(torch.empty(*self.ids.shape, width) for _ in range(3)))
        for start, stop in row_blocks(rows, width):
            values = self.reference.parameters.embedding_rows(name, start, stop)
            rounded = values.to(self.result.source.dtype(other)).to(torch.float32)
            each = _Streams(values, self.result.parameters.plain(other, start, stop), rounded)
            check.look(_Streams(*(piece.T for piece in each)), values.T, start)
            where = (self.ids >= start) & (self.ids < stop)
            for states, piece in zip(streams, each, strict=True):
                states[where] = piece[self.ids[where] - start]
        self.faults += check.faults()
        return streams

    def _pass_stage(
        self, index: int, streams: _Streams, ours: Mapping[str, Any], theirs: Mapping[str, Any]
    ) -> _Streams:
        """The streams behind a block, or behind the norm."""
        name = self.result.stages[index]
        block = self.reference.take(self.reference.stages[index])
        reference = run_block(block, streams.reference, ours)
        other = self.result.take(name)
        merged, merged_here = (run_block(other, states, theirs) for states in (streams.merged, streams.reference))
        del other
        round_to(block, self.result.dtypes(name))
        rounded, rounded_here = (run_block(block, states, ours) for states in (streams.rounded, streams.reference))
        is_block = index < len(self.result.stages) - 1
        added = reference - streams.reference if is_block else reference
        check = _Check(name, "channel")
        here = _Streams(reference, merged_here, rounded_here)
        check.look(_Streams(*(states[self.is_real] for states in here)), added[self.is_real])
        self.faults += check.faults()
        return _Streams(reference, merged, rounded)

    def _compare_logits(self, streams: _Streams) -> Verification:
        """Compare what the heads make of states [N, C], some rows of the heads at a time."""
        check = _Check(HEAD, "row")
        best = [_Best(len(states)) for states in streams]
        largest = torch.zeros(3)  # of merged - reference, rounded - reference, and the reference itself
        dtype = {2: self.result.source.dtype(self.result.parameters.stored_name(HEAD_WEIGHT))}
        rows, width, _ = self.reference.sizes
        for start, stop in row_blocks(rows, width):
            head, other = (each.parameters.linear(HEAD_WEIGHT, start, stop) for each in (self.reference, self.result))
            reference, merged, merged_here = head(streams.reference), other(streams.merged), other(streams.reference)
            round_to(head, dtype)
            rounded, rounded_here = head(streams.rounded), head(streams.reference)
            check.look(_Streams(reference, merged_here, rounded_here), reference, start)
            differences = (merged - reference, rounded - reference, reference)
            largest = torch.maximum(largest, torch.stack([each.abs().max() for each in differences]))
            for one, logits in zip(best, (reference, merged, rounded), strict=True):
                one.look(logits, start)
        self.faults += check.faults()
        difference, explained, highest = largest.tolist()
        if not difference <= (bound := END_FACTOR * explained + END_FLOOR * highest):  # NaN is a fault
            self.faults.append(f"logits: off by up to {difference:.2g}, allowed {bound:.2g}")
        return Verification(
            largest_difference=difference,
            largest_explained=explained,
            equal_tokens=best[0].agreement(best[1]),
            equal_explained=best[0].agreement(best[2]),
            tokens=len(streams.reference),
            prompts=len(self.ids),
            dtype=self.result.dtype,
            faults=self.faults,
        )


class _Check:
    """Whether a part of the merged folder gives what it should, where it is worst.

    Args:
        name: the part's.
        unit: what its columns are called.
    """

    def __init__(self, name: str, unit: str) -> None:
        self.name, self.unit = name, unit
        self._worst, self._fault = 1.0, ""

    def look(self, streams: _Streams, added: Tensor, first: int = 0) -> None:
        """Compare columns, each by its root mean square over the rows.

        Args:
            streams: what the part gives in each of them for one input, [N, M].
            added: [N, M], what the part is there for, the measure of what float32 may do.
            first: the number of the first column.
        """
        measured, size = _rms(streams.merged - streams.reference), _rms(added)
        explained, around = _rms(streams.rounded - streams.reference), _rms(streams.reference)
        bound = FACTOR * explained + FLOOR * (size + _rms(size)) + STATES_FLOOR * around
        excess = torch.where(measured == 0, 0, measured / bound)
        excess = torch.where(bound.isfinite(), excess, math.inf).nan_to_num(math.inf)
        place = int(excess.argmax())
        if self._is_worst(float(excess[place])):
            self._fault = (
                f"{self.name}: {self.unit} {first + place} is off by {float(measured[place]):.2g}, allowed "
                f"{float(bound[place]):.2g} (rounding explains {float(explained[place]):.2g})"
            )
        apart = float(_rms(_rms(streams.merged - streams.rounded)))
        allowed = float(SHARE * _rms(explained) + FLOOR * _rms(size) + STATES_FLOOR * _rms(around))
        if apart and self._is_worst(apart / allowed if allowed else math.inf):
            self._fault = f"{self.name}: off by {apart:.2g} besides rounding, allowed {allowed:.2g}"

    def _is_worst(self, excess: float) -> bool:
        if excess <= self._worst:
            return False
        self._worst = excess
        return True

    def faults(self) -> list[str]:
        return [self._fault] if self._fault else []


class _Best:
    """The most likely next token of each of N, found while the logits come by in pieces."""

    def __init__(self, count: int) -> None:
        self.values, self.ids = torch.full((count,), -math.inf), torch.full((count,), -1)

    def look(self, logits: Tensor, start: int) -> None:
        values, ids = logits.max(dim=-1)
        is_better = values > self.values
        self.values = torch.where(is_better, values, self.values)
        self.ids = torch.where(is_better, ids + start, self.ids)

    def agreement(self, other: _Best) -> float:
        """The share of equal tokens."""
        return float((self.ids == other.ids).float().mean())


def _rms(values: Tensor) -> Tensor:
    """The root mean square over the first dimension."""
    return values.square().mean(0).sqrt()
