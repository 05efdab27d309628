"""The choice of the next token of each row of a batch.

What rows have in common is computed for all at once; each row has its own settings and random numbers, so that its
answer does not depend on the others.

Shapes: R rows, V vocabulary rows, K most likely tokens.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from chat.families import Family
from serving.requests import Sampling

# What the families' makers recommend, for checkpoints whose generation_config.json does not say.
_OF_V1 = Sampling(temperature=1.0, top_p=0.8, top_k=0)
_OF_CHAT = Sampling(temperature=0.7, top_p=0.8, top_k=20)
_OF_THINKING = Sampling(temperature=0.6, top_p=0.95, top_k=20)
_NEUTRAL = Sampling(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)
# transformers' own values where the file samples and does not say how.
_OF_TRANSFORMERS = Sampling(temperature=1.0, top_p=1.0, top_k=50)
_SAMPLING_KEYS = ("do_sample", "temperature", "top_p", "top_k")

# Below this temperature tokens other than the most likely have no share that a float can hold.
_COLDEST = 1e-5
# Among so many tokens those of a top_p are looked for first: sorting a vocabulary takes longer than all the rest.
_CANDIDATES = 1024


def default_sampling(generation_config: Any, family: Family) -> Sampling:
    """Return the values of generation_config.json, else those of the family; without a length limit if it has none."""
    values = {name: getattr(generation_config, name, None) for name in (*_SAMPLING_KEYS, "repetition_penalty")}
    given = Sampling(
        temperature=values["temperature"],
        top_p=values["top_p"],
        top_k=values["top_k"],
        repetition_penalty=values["repetition_penalty"],
        max_tokens=getattr(generation_config, "max_new_tokens", None),
    )
    if all(values[name] is None for name in _SAMPLING_KEYS):
        of_family = _OF_V1 if family.name == "qwen" else _OF_THINKING if family.has_thinking else _OF_CHAT
        return given.filled(of_family).filled(_NEUTRAL)
    if not values["do_sample"]:
        return (
            Sampling(temperature=0.0, max_tokens=given.max_tokens)
            .filled(given)
            .filled(_OF_TRANSFORMERS)
            .filled(_NEUTRAL)
        )
    return given.filled(_OF_TRANSFORMERS).filled(_NEUTRAL)


class RowSampler:
    """Settings, random numbers and history of one row.

    Args:
        sampling: without ``None`` among the values that choose tokens.
        prompt_ids: the repetition penalty counts them.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        self.sampling = sampling
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._generator = torch.Generator().manual_seed(seed)
        self._ids = list(prompt_ids)
        self._counts: Counter[int] = Counter()
        self._repetition: Any = None
        if sampling.repetition_penalty not in (None, 1):
            self._repetition = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty or 1))

    @property
    def is_greedy(self) -> bool:
        return (self.sampling.temperature or 0) < _COLDEST

    def add(self, id_: int) -> None:
        """Count a chosen token."""
        if self._repetition is not None:
            self._ids.append(id_)
        if self.sampling.presence_penalty or self.sampling.frequency_penalty:
            self._counts[id_] += 1

    def draw(self) -> float:
        """Return the next random number, from 0 to 1."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def penalised(self, scores: Tensor) -> Tensor | None:
        """Return scores [V] with the penalties of this row; ``None`` if it has none."""
        if self._repetition is None and not self._counts:
            return None
        if self._repetition is not None:
            ids = torch.tensor([self._ids], device=scores.device)
            scores = self._repetition(ids, scores[None])[0]
        if self._counts:
            ids = torch.tensor(list(self._counts), device=scores.device)
            counts = torch.tensor(list(self._counts.values()), device=scores.device, dtype=scores.dtype)
            penalty = (self.sampling.frequency_penalty or 0) * counts + (self.sampling.presence_penalty or 0)
            scores = scores.index_add(0, ids, -penalty)
        return scores


class Choice(NamedTuple):
    """A chosen token, with its log-probability and those of the most likely tokens if they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose_tokens(logits: Tensor, rows: Sequence[RowSampler]) -> list[Choice]:
    """Choose a token for each row of logits [R, V], and count it."""
    logits = logits.float()
    scores = _with_penalties(logits, rows)
    ids = scores.argmax(-1).tolist()
    drawing = [index for index, row in enumerate(rows) if not row.is_greedy]
    if drawing:
        drawn = _draw(scores[drawing] if len(drawing) < len(rows) else scores, [rows[index] for index in drawing])
        for index, id_ in zip(drawing, drawn, strict=True):
            ids[index] = id_
    choices = [
        Choice(id_) if row.sampling.logprobs is None else _with_logprobs(id_, logits[index], row.sampling.logprobs)
        for index, (id_, row) in enumerate(zip(ids, rows, strict=True))
    ]
    for id_, row in zip(ids, rows, strict=True):
        row.add(id_)
    return choices


def _with_penalties(logits: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    changed = {index: scores for index, row in enumerate(rows) if (scores := row.penalised(logits[index])) is not None}
    if not changed:
        return logits
    return torch.stack([changed.get(index, logits[index]) for index in range(len(rows))])


def _with_logprobs(id_: int, logits: Tensor, count: int) -> Choice:
    logprobs = logits.log_softmax(-1)
    values, ids = _most_likely(logprobs[None], min(count, len(logprobs)))
    return Choice(id_, float(logprobs[id_]), tuple(zip(ids[0].tolist(), values[0].tolist(), strict=True)))


def _most_likely(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` highest of scores [R, V] in float32, and their ids, [R, K]; equal ones in the order of ids.

    Scores of 16 bits are often equal, and ``topk`` orders those as it likes, by ``count`` and by the other rows.
    """
    size = scores.shape[-1]
    bits = scores.view(torch.int32).long()
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    keys = (order << 32) | torch.arange(size - 1, -1, -1, device=scores.device)
    best = keys.sort(dim=-1, descending=True).values if count == size else keys.topk(count).values
    ids = size - 1 - (best & 0xFFFFFFFF)
    return scores.gather(-1, ids), ids


def _draw(scores: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """Draw a token for each row of scores [R, V], by its temperature, then ``top_k``, then ``top_p``."""
    settings = [(row.sampling.temperature, row.sampling.top_k or 0, row.sampling.top_p, row.draw()) for row in rows]
    heat, top_k, top_p, random = (
        torch.tensor(column, device=scores.device, dtype=torch.float64)[:, None]
        for column in zip(*settings, strict=True)
    )
    scores = scores / heat.float()
    drawn: dict[int, int] = {}
    # A row takes the same way whatever the other rows are: both ways use its random number differently.
    limited = [index for index, (_, k, p, _) in enumerate(settings) if k or (p is not None and p < 1)]
    free = sorted({*range(len(rows))} - {*limited})
    if free:
        picked: list[int] = _pick(scores[free].double().softmax(-1), random[free]).tolist()
        drawn |= zip(free, picked, strict=True)
    if limited:
        picked = _draw_limited(scores[limited], top_k[limited], top_p[limited], random[limited])
        drawn |= zip(limited, picked, strict=True)
    return [drawn[index] for index in range(len(rows))]


def _draw_limited(scores: Tensor, top_k: Tensor, top_p: Tensor, random: Tensor) -> list[int]:
    """Draw from the most likely tokens; ``top_k``, ``top_p`` and ``random`` are [R, 1]."""
    size, total = scores.shape[-1], scores.double().logsumexp(-1, keepdim=True)
    has_k = top_k > 0
    most = min(size, int(torch.where(has_k, top_k, _CANDIDATES).max()))
    values, ids = _most_likely(scores, most)
    if most < size and bool((~has_k & ((values - total).exp().sum(-1, keepdim=True) < top_p)).any()):
        values, ids = _most_likely(scores, size)  # top_p needs more tokens than the candidates
    is_beyond_k = has_k & (torch.arange(ids.shape[-1], device=scores.device) >= top_k)
    weights = (values - total).exp().masked_fill(is_beyond_k, 0)
    weights = torch.where(has_k, weights / weights.sum(-1, keepdim=True), weights)
    before = weights.cumsum(-1) - weights
    kept = weights.masked_fill((before >= top_p) & (before > 0), 0)
    chosen: list[int] = ids.gather(-1, _pick(kept, random)[:, None])[:, 0].tolist()
    return chosen


def _pick(weights: Tensor, random: Tensor) -> Tensor:
    """Return the index [R] at which the running sum of weights [R, K] passes a random share [R, 1] of their total."""
    sums = weights.cumsum(-1)
    passed = (sums <= random * sums[:, -1:]).sum(-1)
    return passed.clamp(max=weights.shape[-1] - 1)
