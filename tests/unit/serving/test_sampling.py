"""Tokens are drawn from the distribution that the settings describe, row by row."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chat.families import ANSWER_STYLES, QWEN_V1
from serving import sampling
from serving.requests import RequestError, Sampling
from serving.sampling import RowSampler, choose_tokens, default_sampling

DRAWS = 4000
PLAIN = Sampling(
    temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0
)
SETTINGS = (
    PLAIN,
    replace(PLAIN, temperature=0.5),
    replace(PLAIN, top_k=5),
    replace(PLAIN, top_p=0.7),
    replace(PLAIN, temperature=1.5, top_k=20, top_p=0.8),
    replace(PLAIN, top_k=1),
)


class Even(RowSampler):
    """A row whose random number is given."""

    def __init__(self, settings: Sampling, number: float) -> None:
        super().__init__(settings, ())
        self._number = number

    def draw(self) -> float:
        return self._number


def logits(rows: int = 1, size: int = 60, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def by_transformers(scores: Tensor, settings: Sampling) -> Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(settings.temperature or 1))])
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p and settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    probabilities: Tensor = warpers(torch.zeros(1, 1, dtype=torch.long), scores).softmax(-1)[0]
    return probabilities


@pytest.mark.parametrize("candidates", [8, 1024])
@pytest.mark.parametrize("settings", SETTINGS)
def test_distribution_is_that_of_transformers(
    settings: Sampling, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_CANDIDATES", candidates)
    scores = logits()
    rows: list[Any] = [Even(settings, (number + 0.5) / DRAWS) for number in range(DRAWS)]
    drawn = Counter(choice.id for choice in choose_tokens(scores.expand(DRAWS, -1), rows))
    shares = torch.tensor([drawn[id_] / DRAWS for id_ in range(scores.shape[1])])
    torch.testing.assert_close(shares, by_transformers(scores, settings), atol=2 / DRAWS, rtol=0)


def test_seed_decides_alone_and_among_others() -> None:
    scores = logits(6)
    rows = [RowSampler(replace(settings, seed=n), ()) for n, settings in enumerate(SETTINGS)]
    together = [choice.id for choice in choose_tokens(scores, rows)]
    alone = [
        choose_tokens(scores[n : n + 1], [RowSampler(replace(settings, seed=n), ())])[0].id
        for n, settings in enumerate(SETTINGS)
    ]
    assert together == alone
    others = [RowSampler(replace(settings, seed=9 + n), ()) for n, settings in enumerate(SETTINGS)]
    assert [choice.id for choice in choose_tokens(scores, others)] != together


def test_tokens_that_tie_are_chosen_alone_as_among_others() -> None:
    """Scores of 16 bits are often equal; which of them the settings keep must not depend on other rows."""
    scores = torch.zeros(2, 3000)
    scores[:, 40:] = torch.randn(2960).bfloat16().float().clamp(max=0)
    for settings in (replace(PLAIN, top_k=2), replace(PLAIN, top_p=0.0005), replace(PLAIN, top_k=7, top_p=0.5)):
        for other in SETTINGS:
            for seed in range(5):
                rows = [RowSampler(replace(settings, seed=seed), ()) for _ in range(2)]
                alone = choose_tokens(scores[:1], rows[:1])[0].id
                assert choose_tokens(scores, [rows[1], RowSampler(other, ())])[0].id == alone


@pytest.mark.parametrize(
    "settings", [replace(PLAIN, top_p=0.0), replace(PLAIN, top_k=1), replace(PLAIN, temperature=1e-300)]
)
@pytest.mark.parametrize("candidates", [1, 1024])
def test_settings_that_keep_one_token_are_greedy(
    settings: Sampling, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_CANDIDATES", candidates)
    scores = torch.tensor([[-1.0, 2.0, 2.0, -3.0, 2.0, 1.0], [-5.0, -4.0, -9.0, -4.0, -4.0, -5.0]]).repeat(40, 1)
    chosen = [choice.id for choice in choose_tokens(scores, [RowSampler(settings, ()) for _ in scores])]
    assert chosen == scores.argmax(-1).tolist() == [1, 1] * 40
    assert choose_tokens(scores[:1], [RowSampler(replace(settings, logprobs=3), ())])[0].top[0][0] == 1


def test_row_without_a_seed_draws_one() -> None:
    scores = logits().expand(20, -1)
    assert len({choice.id for choice in choose_tokens(scores, [RowSampler(PLAIN, ()) for _ in range(20)])}) > 1


def test_penalties_are_those_of_each_row() -> None:
    scores = logits(3)
    greedy = replace(PLAIN, temperature=0.0)
    best = [int(id_) for id_ in scores.argmax(-1)]
    rows = [
        RowSampler(replace(greedy, repetition_penalty=1.3), [best[0], 7]),
        RowSampler(greedy, [best[1]]),
        RowSampler(replace(greedy, frequency_penalty=0.5, presence_penalty=0.25), [best[2]]),
    ]
    rows[2].add(5), rows[2].add(5)
    penalised = [row.penalised(scores[index]) for index, row in enumerate(rows)]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[best[0], 7]]), scores[:1])[0]
    assert penalised[0] is not None and torch.equal(penalised[0], expected)
    assert penalised[1] is None
    changed = scores[2].clone()
    changed[5] -= 2 * 0.5 + 0.25  # what the prompt contains does not count
    assert penalised[2] is not None
    torch.testing.assert_close(penalised[2], changed)
    assert [choice.id for choice in choose_tokens(scores, rows)][1] == best[1]


def test_repetition_penalty_counts_the_answer() -> None:
    row = RowSampler(replace(PLAIN, temperature=0.0, repetition_penalty=100.0), ())
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    assert [choose_tokens(scores, [row])[0].id for _ in range(3)] == [0, 1, 2]


def test_logprobs_are_those_before_temperature_and_penalties() -> None:
    scores = logits()
    row = RowSampler(replace(PLAIN, temperature=0.3, frequency_penalty=1.0, logprobs=2, seed=1), ())
    expected = scores.log_softmax(-1)[0]
    for _ in range(2):
        choice = choose_tokens(scores, [row])[0]
        assert choice.logprob == pytest.approx(float(expected[choice.id]))
        values, ids = expected.topk(2)
        assert [id_ for id_, _ in choice.top] == ids.tolist()
        assert [logprob for _, logprob in choice.top] == pytest.approx(values.tolist())


def test_defaults_come_from_the_file_then_from_the_family() -> None:
    file = GenerationConfig(do_sample=True, top_p=0.9, temperature=0.6, repetition_penalty=1.1, max_new_tokens=9)
    found = default_sampling(file, QWEN_V1)
    assert (found.temperature, found.top_p, found.top_k) == (0.6, 0.9, 50)  # top_k as in transformers
    assert (found.repetition_penalty, found.max_tokens) == (1.1, 9)
    assert default_sampling(GenerationConfig(do_sample=False, top_p=0.9), QWEN_V1).temperature == 0
    assert default_sampling(GenerationConfig(), QWEN_V1).top_p == 0.8
    assert default_sampling(GenerationConfig(), ANSWER_STYLES[2]).top_p == 0.95


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1), ("top_p", 2), ("max_tokens", 0), ("stop", ("",)), ("logprobs", 21)]
)
def test_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        Sampling(**{name: value})
    assert caught.value.field == name
