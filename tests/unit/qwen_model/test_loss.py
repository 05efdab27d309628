"""The lean loss equals the loss of full logits: value, gradients and accuracy, for every kind of head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from qwen_model import lean_loss, lean_models
from qwen_model.head import why_opaque
from qwen_model.lean_loss import lean_causal_lm_loss
from qwen_model.lean_models import LeanQwen2ForCausalLM, LeanQwen3ForCausalLM, LeanQWenLMHeadModel
from qwen_model.loss import causal_lm_loss
from tests.golden import SMALL, relative_difference

IDS = torch.tensor([[701, 5, 9, 702, 33, 701, 40, 41, 702, 7], [701, 8, 702, 701, 90, 91, 92, 93, 94, 95]])
LABELS = torch.tensor(
    [[701, -100, 9, 702, -100, 701, 40, 41, 702, 7], [-100, -100, -100, -100, 90, 91, -100, 93, 94, 95]]
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use chunks of three positions, so that there are several and the last one is shorter."""
    monkeypatch.setattr(lean_loss, "LOGITS_CHUNK_BYTES", 3 * 4 * 960)


def build(name: str = "tiny-qwen-small", **adapter: Any) -> nn.Module:
    torch.manual_seed(0)
    model: Any = LeanQWenLMHeadModel.from_pretrained(SMALL / name, dtype=torch.float32)
    if adapter:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.0, **adapter))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.1)
            elif "magnitude" in key:
                parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
    return model.train()


HEADS: dict[str, Callable[[], nn.Module]] = {
    "trained": build,
    "frozen": lambda: build(target_modules=["c_attn"]),
    "copied": lambda: build(target_modules=["c_attn"], modules_to_save=["wte", "lm_head"]),
    "rows": lambda: build(
        target_modules=["c_attn"], trainable_token_indices={"wte": [701, 702], "lm_head": [701, 702]}
    ),
    "lora": lambda: build(target_modules=["c_attn", "lm_head"]),
    "lora with a bias": lambda: build(target_modules=["c_attn", "lm_head"], lora_bias=True),
    "biases of adapted layers": lambda: build(target_modules=["c_attn", "lm_head"], bias="lora_only"),
}


def head_of_model(model: Any) -> nn.Module:
    head: nn.Module = model.get_base_model().lm_head if hasattr(model, "get_base_model") else model.lm_head
    return head


def with_head(change: Callable[[Any], object], **adapter: Any) -> nn.Module:
    model = build(**adapter)
    change(head_of_model(model))
    return model


class Capped(nn.Linear):
    """A head that limits its logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5 * torch.tanh(super().forward(x) / 5)


def set_forward(head: Any) -> None:
    head.forward = lambda x: 2 * F.linear(x, head.weight)


def add_second_adapter() -> nn.Module:
    model: Any = build(target_modules=["c_attn", "lm_head"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    return model


# Heads whose output is not computed from known tensors alone.
OPAQUE: dict[str, Callable[[], nn.Module]] = {
    "dora": lambda: build(target_modules=["c_attn", "lm_head"], use_dora=True),
    "forward hook": lambda: with_head(lambda head: head.register_forward_hook(lambda *args: 2 * args[-1])),
    "forward pre-hook": lambda: with_head(lambda head: head.register_forward_pre_hook(lambda head, args: 2 * args[0])),
    "backward hook": lambda: with_head(
        lambda head: head.register_full_backward_hook(lambda head, inputs, outputs: (2 * inputs[0],))
    ),
    "hook on the second matrix of an adapter": lambda: with_head(
        lambda head: head.lora_B["default"].register_forward_hook(lambda *args: 2 * args[-1]),
        target_modules=["lm_head"],
    ),
    "hook on the trained copy": lambda: with_head(
        lambda head: head.modules_to_save["default"].register_forward_hook(lambda *args: 2 * args[-1]),
        target_modules=["c_attn"], modules_to_save=["lm_head"],
    ),
    "another class": lambda: with_head(lambda head: setattr(head, "__class__", Capped)),
    "a forward of its own": lambda: with_head(set_forward),
    "two adapters": add_second_adapter,
}  # fmt: skip


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def compare(model: nn.Module, rtol: float = 1e-5, **inputs: Any) -> None:
    inputs = {"input_ids": IDS, "labels": LABELS} | inputs
    full = model(**inputs)
    full.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    lean = model(**inputs, loss_only=True)
    lean.loss.backward()
    assert lean.logits is None
    assert abs(lean.loss - full.loss) <= 1e-6 * abs(full.loss)
    correct = (full.logits[:, :-1].argmax(-1) == inputs["labels"][:, 1:]) & (inputs["labels"][:, 1:] != -100)
    assert lean.num_correct.item() == correct.sum().item()
    actual = gradients(model)
    assert actual.keys() == expected.keys() and actual
    for name, gradient in expected.items():
        assert relative_difference(actual[name], gradient) <= rtol, name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("count", [None, 37, torch.tensor(37)])
def test_lean_loss_equals_full_loss(head: str, count: Any) -> None:
    compare(HEADS[head](), num_items_in_batch=count)


@pytest.mark.parametrize("head", HEADS)
def test_known_heads_need_no_logits(head: str) -> None:
    assert why_opaque(head_of_model(HEADS[head]())) == ""


@pytest.mark.parametrize("head", OPAQUE)
def test_heads_that_are_not_known_use_full_logits(head: str, caplog: pytest.LogCaptureFixture) -> None:
    lean_models._warn_of_full_logits.cache_clear()
    model = OPAQUE[head]()
    compare(model, num_items_in_batch=37)
    model.zero_grad()
    compare(model)
    [record] = [record for record in caplog.records if record.name == "qwen_model.lean_models"]
    assert record.getMessage().startswith("The head ") and "--loss full_logits" in record.getMessage()


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_weights_and_smoothing_with_an_opaque_head(epsilon: float) -> None:
    inputs = {"input_ids": IDS, "labels": LABELS, "loss_weights": torch.rand(2, 10), "label_smoothing": epsilon}
    model = build()
    lean = model(**inputs, loss_only=True).loss
    head_of_model(model).register_forward_hook(lambda *args: None)
    full = model(**inputs, loss_only=True).loss
    torch.testing.assert_close(full, lean, rtol=1e-6, atol=0)


def test_known_number_of_targets() -> None:
    compare(build(), num_targets=int((LABELS[:, 1:] != -100).sum()))


def test_frozen_head_has_no_gradient() -> None:
    model = HEADS["frozen"]()
    model(input_ids=IDS, labels=LABELS, loss_only=True).loss.backward()
    assert model.get_output_embeddings().weight.grad is None


def test_gradients_of_trained_rows_have_only_their_size() -> None:
    model = HEADS["rows"]()
    model(input_ids=IDS, labels=LABELS, loss_only=True).loss.backward()
    deltas = {name: grad for name, grad in gradients(model).items() if "trainable_tokens_delta" in name}
    assert {tuple(grad.shape) for grad in deltas.values()} == {(2, 32)}
    assert all(grad.any() for grad in deltas.values())


def test_tied_embedding_and_head() -> None:
    ids, labels = IDS % 64, LABELS.where(LABELS == -100, LABELS % 64)
    compare(build("tiny-qwen-tied"), input_ids=ids, labels=labels)


def test_gradient_checkpointing() -> None:
    model = build()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compare(model)


@pytest.mark.parametrize("model_class", [LeanQwen2ForCausalLM, LeanQwen3ForCausalLM])
@pytest.mark.parametrize("tied", [False, True])
def test_later_families(model_class: Any, tied: bool) -> None:
    torch.manual_seed(0)
    config = model_class.config_class(
        vocab_size=960, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    compare(model_class(config).train(), num_items_in_batch=torch.tensor(11))


def reference(hidden: torch.Tensor, weight: torch.Tensor, weights: torch.Tensor, epsilon: float) -> torch.Tensor:
    losses = F.cross_entropy(
        (hidden @ weight.T)[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), reduction="none", label_smoothing=epsilon
    )
    return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:][LABELS[:, 1:] != -100].sum()


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_loss_weights_and_label_smoothing(epsilon: float) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 10, 32), nn.Linear(32, 960, bias=False)
    weights = torch.rand(2, 10) * (LABELS != -100)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss, _ = lean_causal_lm_loss(ours, head, LABELS, loss_weights=weights, label_smoothing=epsilon)
    expected = reference(theirs, head.weight, weights, epsilon)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    expected_head = torch.autograd.grad(expected, [head.weight, theirs])
    actual_head = torch.autograd.grad(loss, [head.weight, ours])
    for actual, wanted in zip(actual_head, expected_head, strict=True):
        assert relative_difference(actual, wanted) <= 1e-5


def test_head_with_bias() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 10, 32), nn.Linear(32, 960)
    loss, _ = lean_causal_lm_loss(hidden, head, LABELS)
    full = causal_lm_loss(head(hidden), LABELS)
    torch.testing.assert_close(loss, full, rtol=1e-6, atol=0)
    for actual, wanted in zip(
        *(torch.autograd.grad(value, [head.weight, head.bias]) for value in (loss, full)), strict=True
    ):
        assert relative_difference(actual, wanted) <= 1e-5


def test_batch_without_targets_has_loss_and_gradient_zero() -> None:
    hidden, head = torch.randn(1, 4, 32, requires_grad=True), nn.Linear(32, 960, bias=False)
    loss, correct = lean_causal_lm_loss(hidden, head, torch.full((1, 4), -100))
    loss.backward()
    assert loss.item() == 0 and correct.item() == 0
    assert not hidden.grad.any()


def test_second_backward_pass_is_refused() -> None:
    hidden, head = torch.randn(2, 10, 32, requires_grad=True), nn.Linear(32, 960, bias=False)
    loss, _ = lean_causal_lm_loss(hidden, head, LABELS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True])
def test_half_precision_is_as_accurate_as_full_logits(dtype: torch.dtype, trained: bool) -> None:
    """Over 20 seeds, under autocast as in the trainer: at most 1.1 times the error of the full loss."""
    lean_errors, full_errors = {"loss": 0.0, "hidden": 0.0, "weight": 0.0}, {"loss": 0.0, "hidden": 0.0, "weight": 0.0}
    for seed in range(20):
        torch.manual_seed(seed)
        start, weight = torch.randn(2, 10, 32), torch.randn(960, 32) * 0.2
        exact = _with_gradients(start, weight, trained, None, lean=False)
        for errors, lean in ((lean_errors, True), (full_errors, False)):
            for name, value in _with_gradients(start, weight, trained, dtype, lean).items():
                errors[name] += relative_difference(value, exact[name])
    for name, error in lean_errors.items():
        assert error <= 1.1 * full_errors[name] + 1e-6, name


def _with_gradients(
    start: torch.Tensor, weight: torch.Tensor, trained: bool, dtype: torch.dtype | None, lean: bool
) -> dict[str, torch.Tensor]:
    hidden, head = start.clone().requires_grad_(), nn.Linear(32, 960, bias=False)
    head.weight = nn.Parameter(weight.clone(), requires_grad=trained)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = lean_causal_lm_loss(hidden, head, LABELS)[0] if lean else causal_lm_loss(head(hidden), LABELS)
    loss.backward()
    results = {"loss": loss.detach(), "hidden": hidden.grad}
    return results | ({"weight": head.weight.grad} if trained else {})


@pytest.mark.parametrize("vocabulary", [1, 7, 48, 960, 1187])
def test_the_most_likely_token_is_the_first_of_equal_ones(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randint(0, 4, (20, vocabulary), generator=generator).float()  # many are equal
    largest, best = lean_loss._find_largest(logits)
    assert torch.equal(largest, logits.amax(1, keepdim=True))
    assert best.tolist() == [[row.index(max(row))] for row in logits.tolist()]


def test_a_target_that_is_all_but_impossible_has_a_finite_loss() -> None:
    head = nn.Linear(1, 32, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-500, 500, 32)[:, None])
    hidden = torch.ones(1, 2, 1, requires_grad=True)
    loss, correct = lean_causal_lm_loss(hidden, head, torch.tensor([[0, 0]]))
    assert loss.item() == pytest.approx(1000) and correct == 0
