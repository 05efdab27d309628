"""The gated delta rule in chunks: its definition token by token, its gradient, and samples that do not meet."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from qwen_model import delta_net, delta_rule
from qwen_model.delta_net import _convolved, _kernel
from qwen_model.delta_rule import gated_delta_rule

LENGTHS = (150, 64, 1, 65, 150, 20)


def inputs(lengths: Sequence[int], shared: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return random queries, keys, values, decays and strengths of 2 heads of keys."""
    torch.manual_seed(0)
    tokens, heads = sum(lengths), 2 * shared
    query, key, value = (torch.randn(tokens, count, size) for count, size in ((2, 16), (2, 16), (heads, 8)))
    log_decay, strength = -torch.rand(tokens, heads), torch.rand(tokens, heads)
    return [each.to(dtype).requires_grad_() for each in (query, key, value, log_decay, strength)]


def by_token(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor) -> Tensor:
    """Compute one sample as the rule is defined."""
    shared = value.shape[1] // query.shape[1]
    query, key = (F.normalize(each, dim=-1, eps=0).repeat_interleave(shared, 1) for each in (query, key))
    state, outputs = value.new_zeros(value.shape[1], key.shape[-1], value.shape[-1]), []
    for q, k, v, g, b in zip(query, key, value, log_decay, strength, strict=True):
        state = state * g.exp()[:, None, None]
        written = (v - torch.einsum("hd,hde->he", k, state)) * b[:, None]
        state = state + k[:, :, None] * written[:, None]
        outputs.append(torch.einsum("hd,hde->he", q, state) / key.shape[-1] ** 0.5)
    return torch.stack(outputs)


def gradients(output: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    factors = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    return torch.autograd.grad((output * factors).sum(), tensors)


@pytest.mark.parametrize("shared", [1, 3])
def test_outputs_and_gradients_are_those_of_the_definition(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_rule, "_EPSILON", 0)
    tensors = inputs(LENGTHS, shared)
    samples = zip(*(each.split(LENGTHS) for each in tensors), strict=True)
    expected = torch.cat([by_token(*sample) for sample in samples])
    actual = gated_delta_rule(*tensors, LENGTHS)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for one, other in zip(gradients(actual, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_outputs_are_those_of_transformers() -> None:
    tensors = inputs((100,), dtype=torch.float32)
    query, key, value, log_decay, strength = (each[None] for each in tensors)
    query, key = (each.repeat_interleave(2, 2) for each in (query, key))  # earlier versions do not share heads
    expected, _ = torch_recurrent_gated_delta_rule(
        query, key, value, g=log_decay, beta=strength, use_qk_l2norm_in_kernel=True
    )
    torch.testing.assert_close(gated_delta_rule(*tensors, (100,)), expected[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("log_decay", "strength", "is_same_key"), [(-80.0, 1.0, False), (0.0, 1.0, True), (-1e-3, 0.999, True)]
)
def test_extremes_stay_exact(log_decay: float, strength: float, is_same_key: bool) -> None:
    """Everything is forgotten at once, or each token overwrites what the one before has written."""
    query, key, value, decays, strengths = inputs((130,))
    with torch.no_grad():
        decays.fill_(log_decay)
        strengths.fill_(strength)
        if is_same_key:
            key.copy_(key[:1].expand_as(key))
    tensors = (query, key, value, decays, strengths)
    narrow = [each.detach().float().requires_grad_() for each in tensors]
    exact, rounded = by_token(*tensors), gated_delta_rule(*narrow, (130,))
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=1e-5)
    for one, other in zip(gradients(rounded, narrow), gradients(exact, tensors), strict=True):
        assert (one - other).norm() <= 2e-4 * max(1, other.norm())


def test_samples_do_not_change_with_their_neighbours() -> None:
    tensors, lengths = inputs(LENGTHS, dtype=torch.float32), list(LENGTHS)
    changed = [torch.cat([each[:150], each[150:214] * 0.5, each[214:]]) for each in tensors]
    before, after = (gated_delta_rule(*each, lengths).split(lengths) for each in (tensors, changed))
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False, True, True, True, True]


def test_the_convolution_is_that_of_torch_within_each_sample() -> None:
    torch.manual_seed(0)
    layer, states = nn.Conv1d(6, 6, 4, groups=6, bias=False, padding=3).double(), torch.randn(33, 6).double()
    lengths = (20, 1, 3, 9)
    tensors = (states.requires_grad_(), layer.weight)
    samples = (F.silu(layer(sample.T[None])[0, :, : len(sample)]).T for sample in states.split(lengths))
    expected, actual = torch.cat(list(samples)), _convolved(states, layer.weight, lengths)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, tensors), gradients(expected, tensors))


def test_kernels_of_flash_linear_attention_get_the_samples_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(
        q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, use_qk_l2norm_in_kernel: bool, cu_seqlens: Tensor
    ) -> Any:
        """What the package documents, without a GPU."""
        assert use_qk_l2norm_in_kernel and q.shape[2] == k.shape[2] == v.shape[2]
        bounds = pairwise(cu_seqlens.tolist())
        rows = [
            gated_delta_rule(*(each[0, start:end] for each in (q, k, v, g, beta)), [end - start])
            for start, end in bounds
        ]
        return torch.cat(rows)[None], None

    _kernel.cache_clear()
    assert _kernel() is None, "the package is not installed here"
    _kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", SimpleNamespace(chunk_gated_delta_rule=kernel))
    rule, tensors = _kernel(), inputs(LENGTHS)
    assert rule is not None
    torch.testing.assert_close(rule(*tensors, LENGTHS), gated_delta_rule(*tensors, LENGTHS))
    delta_net._kernel.cache_clear()
