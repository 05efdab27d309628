"""The lean loss in blocks of columns and chunks of positions, with everything that a head can consist of at once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_model import lean_loss
from tests.golden import relative_difference

POSITIONS, HIDDEN, VOCABULARY, RANK = 23, 16, 650, 4
ROW_IDS = torch.tensor([3, 129, 649])
NAMES = ("hidden", "weight", "bias", "row_values", "adapter_input", "adapter_output")


def inputs_of(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = ((POSITIONS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,), (3, HIDDEN), (POSITIONS, RANK))
    tensors = [torch.randn(shape) for shape in (*shapes, (VOCABULARY, RANK))]
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in zip(NAMES, tensors, strict=True)}


def reference(inputs: dict[str, Tensor], targets: Tensor, weights: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    hidden, weight, bias, row_values, adapter_input, adapter_output = inputs.values()
    logits = hidden @ weight.T + adapter_input @ adapter_output.T
    logits = logits.index_copy(1, ROW_IDS, hidden @ row_values.T) + bias
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=epsilon)
    return (losses * weights).sum(), (logits.argmax(1) == targets).sum()


@pytest.mark.parametrize("block", [1, 4 * POSITIONS * 256, 2**20], ids=["128 columns", "256 columns", "all columns"])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("needed", [NAMES, ("hidden", "adapter_input"), ("weight",), ("bias", "row_values"), ()])
def test_every_gradient_equals_that_of_full_logits(
    needed: tuple[str, ...], epsilon: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lean_loss, "_BLOCK_BYTES", {"cpu": block})
    monkeypatch.setattr(lean_loss, "LOGITS_CHUNK_BYTES", max(block, 7 * 4 * VOCABULARY))
    monkeypatch.setattr(lean_loss, "_MOST_POSITIONS", 10)
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=torch.Generator().manual_seed(1))
    targets[:4] = torch.tensor([3, 129, 649, 128])
    weights = torch.rand(POSITIONS, generator=torch.Generator().manual_seed(2))
    exact, ours = inputs_of(torch.float64), inputs_of(torch.float32)
    for name in set(NAMES) - set(needed):
        ours[name].requires_grad_(False)
    expected, expected_correct = reference(exact, targets, weights.double(), epsilon)
    arguments: Any = (*ours.values(), ROW_IDS, targets, weights, epsilon)
    loss, correct = lean_loss._LeanCrossEntropy.apply(*arguments)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert correct == expected_correct
    if needed:
        loss.backward()
        expected.backward()
    for name in needed:
        assert ours[name].grad is not None and exact[name].grad is not None
        assert relative_difference(ours[name].grad, exact[name].grad) <= 2e-6, name


def test_blocks_that_trained_rows_replace_altogether_count_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_loss, "_BLOCK_BYTES", {"cpu": 1})
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(300, 8)
    ids, rows = torch.arange(128), torch.randn(128, 8)  # the whole first block
    targets, weights = torch.tensor([0, 127, 128, 299, 5]), torch.ones(5)
    arguments: Any = (hidden, weight, None, rows, None, None, ids, targets, weights, 0.0)
    loss, _ = lean_loss._LeanCrossEntropy.apply(*arguments)
    expected = F.cross_entropy(hidden @ torch.cat([rows, weight[128:]]).T, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    for actual, wanted in zip(*(torch.autograd.grad(each, hidden) for each in (loss, expected)), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_gradients_of_learnt_targets_are_exact_in_half_precision() -> None:
    """A target's probability and 1 are close: their difference must not be one of rounded numbers."""
    torch.manual_seed(0)
    weight = torch.randn(400, 32)
    targets = torch.arange(6)
    start = weight[targets] * torch.linspace(0.25, 0.5, 6)[:, None]  # probabilities of 0.9 to 0.9999
    gradients: list[Tensor] = []
    for dtype, trained in itertools.product((torch.float64, torch.bfloat16), (False, True)):
        hidden, head = start.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_(), weight
        if dtype == torch.float64:
            F.cross_entropy(hidden @ head.double().T, targets, reduction="sum").backward()
        else:
            head = weight.clone().requires_grad_(trained)
            with torch.autocast("cpu", torch.bfloat16):
                arguments: Any = (hidden, head, None, None, None, None, None, targets, torch.ones(6), 0.0)
                loss, _ = lean_loss._LeanCrossEntropy.apply(*arguments)
            loss.backward()
        assert hidden.grad is not None
        gradients.append(hidden.grad)
    for rounded in gradients[2:]:
        assert relative_difference(rounded, gradients[0]) <= 0.05
