"""What base, base + adapters and a merged folder predict for the same samples, with one layer of each in memory.

Shapes: P samples, T tokens of the longest, N predicted tokens in total, C hidden size, V vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from chat.label_mask import IGNORE_INDEX
from checkpoints.fold import WeightedAdapter
from checkpoints.other_parts import OtherParts
from checkpoints.shards import open_checkpoint, open_left_out
from checkpoints.source import TensorSource, main_dtype, row_blocks
from checkpoints.whole import load_text_config
from errors import ConfigError
from export.verify.layered_model import HeldTensors, LayeredModel
from export.verify.reference import AdaptedParameters
from export.verify.samples import Samples
from export.verify.weights import same_bits
from qwen_model.architectures import HEAD_WEIGHT
from qwen_model.block_runner import run_block

NOTICEABLE_LOSS = 0.25
"""Share of what the adapter learnt on the samples whose loss is reported as a warning."""

SIGNIFICANCE = 3.0
"""Standard errors by which the mean loss must differ for a warning."""


@dataclass(frozen=True)
class Behaviour:
    """Predictions of three models for the same samples.

    Attributes:
        base_loss, adapter_loss, merged_loss: mean cross-entropy over the tokens, of the base, base + adapters and the
            merged folder.
        base_equal, merged_equal: shares of tokens for which the most likely one is that of base + adapters.
        error: standard error of ``merged_loss - adapter_loss``.
        tokens: N.
    """

    base_loss: float
    adapter_loss: float
    merged_loss: float
    base_equal: float
    merged_equal: float
    error: float
    tokens: int
    samples: Samples

    def __str__(self) -> str:
        if not self.tokens:
            return "no answers compared: config.json allows texts of one token only"
        what = "the adapter's answers on" if self.samples.are_trained else "base + adapter on"
        return (
            f"{what} {self.samples}: loss {self.adapter_loss:.3f}, merged {self.merged_loss:.3f}; same next token at "
            f"{self.merged_equal:.1%} of {self.tokens} tokens "
            f"(without the adapter: {self.base_loss:.3f}, {self.base_equal:.1%})"
        )

    @property
    def lost_share(self) -> float:
        """Share of what the adapter learnt on its samples that the merged model lacks; 0 if it is not measurable."""
        learnt, lost = self.base_loss - self.adapter_loss, self.merged_loss - self.adapter_loss
        is_lost = learnt > 0 and lost > SIGNIFICANCE * self.error  # false for NaN
        return lost / learnt if self.samples.are_trained and is_lost else 0.0


class NextTokens:
    """Loss and most likely next token at N positions, from logits that arrive in slices of the vocabulary."""

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets
        self._target_logits = torch.zeros(len(targets))
        self._log_sums, self._best = torch.full((2, len(targets)), -math.inf)
        self.ids = torch.full((len(targets),), -1)

    def update(self, logits: Tensor, start: int) -> None:
        """Add logits [N, rows] of the vocabulary rows from ``start`` on."""
        self._log_sums = torch.logaddexp(self._log_sums, logits.logsumexp(-1))
        values, ids = logits.max(dim=-1)
        is_better = values > self._best
        self._best, self.ids = torch.where(is_better, values, self._best), torch.where(is_better, ids + start, self.ids)
        inside = (self._targets >= start) & (self._targets < start + logits.shape[1])
        self._target_logits[inside] = logits[inside, self._targets[inside] - start]

    def losses(self) -> Tensor:
        """Cross-entropy at each position."""
        return self._log_sums - self._target_logits

    def agreement(self, other: NextTokens) -> float:
        """Return the share of positions with equal tokens."""
        return float((self.ids == other.ids).float().mean())


class Streams:
    """Passes samples through several models, stage by stage.

    Args:
        models: module structure and parameters of each.

    Attributes:
        states: of each model, [P, T, C].
    """

    def __init__(self, models: Sequence[tuple[LayeredModel, AdaptedParameters]], samples: Samples) -> None:
        self._models = models
        self.ids = pad_sequence([torch.tensor(sample.ids) for sample in samples.items], batch_first=True)
        labels = [torch.tensor(sample.labels) for sample in samples.items]
        targets = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)[:, 1:]
        self._counts = targets != IGNORE_INDEX
        self._targets = targets[self._counts]
        # Padding is on the right, where causal attention of real tokens does not reach.
        mask = pad_sequence([torch.ones(len(sample.ids)) for sample in samples.items], batch_first=True).long()
        self.states = [self._embed(model, parameters) for model, parameters in models]
        self._arguments = [
            model.stage_arguments(states, mask) for (model, _), states in zip(models, self.states, strict=True)
        ]

    def _embed(self, model: LayeredModel, parameters: AdaptedParameters) -> Tensor:
        used, positions = self.ids.unique(return_inverse=True)
        rows = [parameters.embedding_rows(model.embedding, id_, id_ + 1) for id_ in used.tolist()]
        return torch.cat(rows)[positions]

    def run_stage(self, index: int) -> None:
        """Replace the states by those after a block, or after the final norm."""
        for number, (model, parameters) in enumerate(self._models):
            stage = model.load_stage(model.stages[index], parameters)
            self.states[number] = run_block(stage, self.states[number], self._arguments[number][index])

    def predictions(self) -> list[NextTokens]:
        """Return what each model predicts from its last states."""
        results = [NextTokens(self._targets) for _ in self._models]
        counted = [states[:, :-1][self._counts] for states in self.states]
        rows, width, _ = self._models[0][0].sizes
        for start, stop in row_blocks(rows, width):
            if self._have_one_head(start, stop):  # one product is faster
                head = self._models[0][1].linear_rows(HEAD_WEIGHT, start, stop)
                outputs = head(torch.cat(counted)).chunk(len(counted))
            else:
                heads = (parameters.linear_rows(HEAD_WEIGHT, start, stop) for _, parameters in self._models)
                outputs = tuple(head(states) for head, states in zip(heads, counted, strict=True))
            for result, logits in zip(results, outputs, strict=True):
                result.update(logits, start)
        return results

    def _have_one_head(self, start: int, stop: int) -> bool:
        """Return whether rows of the head are the same in all models."""
        parameters = [each for _, each in self._models]
        sources = {id(each.source): each for each in parameters}.values()  # base and adapter read the same one
        first, *others = (each.source.rows(each.stored_name(HEAD_WEIGHT), start, stop) for each in sources)
        same = all(each.dtype == first.dtype and same_bits(each, first) for each in others)
        return same and not any(each.changes(HEAD_WEIGHT, start, stop) for each in parameters)


class Comparison:
    """Base, base + adapters, and a merged folder, in three streams of the same samples.

    Args:
        base: the base's tensors by the names of its layout, dequantised.
        base_config: contents of its config.json; of a larger model, the config of its text model.
        adapters: in the base's layout.
        merged: the merged folder, in any layout.
        samples: to compare answers on; cut to the length that both models were trained for.
        other_parts: what the base's folder has beside its text model.

    Attributes:
        base_config, written_config: contents of the base's config.json and of the folder's.
        other_parts: what base and folder have beside their text models.
        reference, result: module structures of the base's config and of the folder's.
        base, adapted, merged: parameters of the three models.

    Raises:
        ConfigError: tensors of the base, or files of the folder, are missing.
    """

    def __init__(
        self,
        base: TensorSource,
        base_config: Mapping[str, Any],
        adapters: Sequence[WeightedAdapter],
        merged: Path,
        samples: Samples,
        other_parts: OtherParts | None = None,
    ) -> None:
        self.written = open_checkpoint(merged)
        self.other_parts = (other_parts, open_left_out(merged)) if other_parts is not None else None
        self.base_config, self.written_config = base_config, load_text_config(merged)
        same_layout = base_config["model_type"] == self.written_config.get("model_type")
        dtypes = {main_dtype(base), main_dtype(self.written)}
        fast = computes_bfloat16() and same_layout and dtypes == {torch.bfloat16}
        self.keeps_bfloat16 = fast
        self.source = HeldTensors(base, fast)
        self.reference = LayeredModel(base_config, base)
        self.result = LayeredModel(self.written_config, self.written)
        tied_to = self.reference.tied_to
        self.base = AdaptedParameters(self.source, (), tied_to, fast)
        self.adapted = AdaptedParameters(self.source, adapters, tied_to, fast)
        self.merged = AdaptedParameters(self.written, (), self.result.tied_to, fast)
        if faults := self.reference.faults(base):
            raise ConfigError(f"the base: {faults[0]}", "Copy or download its config.json and weights again")
        self.samples = samples.cut(min(self.reference.trained_length, self.result.trained_length))

    @property
    def stages(self) -> list[str]:
        """Names of the stages in the base's layout."""
        return self.reference.stages

    def start(self) -> Streams:
        """Return the three streams after the embedding."""
        models = [(self.reference, self.base), (self.reference, self.adapted), (self.result, self.merged)]
        return Streams(models, self.samples)

    def hold(self, stage: str) -> None:
        """Read and dequantise the base's tensors of a stage, for all that follows on this stage."""
        self.source.hold(self.reference.tensors_of(stage))

    def behaviour(self, streams: Streams) -> Behaviour:
        """Return the result of streams that have passed all stages."""
        self.source.hold([])
        base, adapted, merged = streams.predictions()
        losses = [each.losses() for each in (base, adapted, merged)]
        difference = losses[2] - losses[1]
        return Behaviour(
            base_loss=float(losses[0].mean()),
            adapter_loss=float(losses[1].mean()),
            merged_loss=float(losses[2].mean()),
            base_equal=adapted.agreement(base),
            merged_equal=adapted.agreement(merged),
            error=float(difference.std() / math.sqrt(len(difference))) if len(difference) > 1 else math.inf,
            tokens=len(difference),
            samples=self.samples,
        )


@torch.no_grad()
def compare_answers(
    comparison: Comparison, on_progress: Callable[[int, int], object] = lambda done, total: None
) -> Behaviour:
    """Compare the predictions of a merged folder with those of base + adapters, without checking its weights.

    Args:
        on_progress: called with the number of finished steps (about one per layer) and their total.
    """
    streams, steps = comparison.start(), len(comparison.stages) + 1
    for index, stage in enumerate(comparison.stages):
        comparison.hold(stage)
        streams.run_stage(index)
        on_progress(index + 1, steps)
    behaviour = comparison.behaviour(streams)
    on_progress(steps, steps)
    return behaviour


def computes_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 matrices, which is then twice as fast as float32 here."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
