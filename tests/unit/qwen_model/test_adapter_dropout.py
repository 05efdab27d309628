"""Dropout of adapters: its share, its independence of positions, its gradient, and what it saves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qwen_model.adapter_dropout import AdapterDropout, drop


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
def test_each_value_is_dropped_with_the_same_probability(p: float) -> None:
    torch.manual_seed(0)
    rows, columns = 2000, 100
    dropped, _, factor = drop(torch.ones(rows, columns), p)
    is_dropped = (dropped == 0).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(is_dropped.mean() - p) < 5 * deviation / (rows * columns) ** 0.5
    assert (is_dropped.mean(0) - p).abs().max() < 5 * deviation / rows**0.5
    assert (is_dropped.mean(1) - p).abs().max() < 6 * deviation / columns**0.5
    assert factor == 1 / (1 - p)


def test_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    p, count = 0.3, 200_000
    dropped, _, _ = drop(torch.ones(count), p)
    is_dropped = (dropped == 0).double()
    for distance in (1, 2, 3, 7):
        both = (is_dropped[distance:] * is_dropped[:-distance]).mean()
        assert abs(both - p * p) < 5 * (p * p / count) ** 0.5


def test_short_tensors_and_the_last_value_are_dropped_as_often() -> None:
    torch.manual_seed(0)
    shares = torch.stack([drop(torch.ones(3), 0.5)[0] == 0 for _ in range(1000)]).double().mean(0)
    assert (shares - 0.5).abs().max() < 0.08
    assert drop(torch.ones(0, 4), 0.5)[0].shape == (0, 4)


def test_values_and_gradients_have_the_same_zeros() -> None:
    layer, x = AdapterDropout(0.4), torch.ones(40, 5, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert x.grad is not None and torch.equal(output.detach(), x.grad)
    assert set(output.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}


@pytest.mark.parametrize("layer", [AdapterDropout(0.4).eval(), AdapterDropout(0.0), AdapterDropout(1.0)])
def test_without_random_numbers_it_is_dropout(layer: AdapterDropout) -> None:
    x = torch.randn(3, 5)
    assert torch.equal(layer(x), nn.Dropout(layer.p).train(layer.training)(x))


def test_narrow_values_are_rounded_once() -> None:
    x = torch.randn(50, 4).bfloat16()
    torch.manual_seed(0)
    wide = AdapterDropout(0.1)(x.float())
    torch.manual_seed(0)
    assert torch.equal(AdapterDropout(0.1)(x), wide.bfloat16())


def test_it_compiles_without_breaking_the_graph() -> None:
    layer = nn.Sequential(nn.Linear(4, 4), AdapterDropout(0.4))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    output = compiled(torch.ones(200, 4))
    output.sum().backward()
    assert 0.3 < (output == 0).double().mean() < 0.5
