"""Gradients against the original's, tensor by tensor; gradient checkpointing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qwen_model.modeling_qwen import QWenLMHeadModel
from tests.golden import GRADIENT_RTOL, Golden, relative_difference


def gradients(model: QWenLMHeadModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compute the gradient of the mean loss for every parameter."""
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def recorded_gradients(
    golden: Golden, prefix: str, input_ids: torch.Tensor, computed: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield name, computed and recorded gradient of each tensor of the set; of large tensors only recorded rows."""
    pattern = re.compile(re.escape(prefix) + r"(?P<name>.+?)(?:\.s(?P<stride>\d+)|(?P<rows>\.rows_of_input0))?")
    for key in golden.tensors:
        if not (match := pattern.fullmatch(key)):
            continue
        gradient = computed[match["name"]]
        if match["stride"]:
            gradient = gradient[:: int(match["stride"])]
        elif match["rows"]:
            gradient = gradient[input_ids[0]]
        yield key, gradient, golden.tensors[key]


def assert_gradients(golden: Golden, prefix: str, input_ids: torch.Tensor, computed: dict[str, torch.Tensor]) -> None:
    compared = set()
    for key, gradient, expected in recorded_gradients(golden, prefix, input_ids, computed):
        assert gradient.shape == expected.shape, key
        assert relative_difference(gradient, expected) <= GRADIENT_RTOL, key
        compared.add(re.sub(r"\.(s\d+|rows_of_input0)$", "", key.removeprefix(prefix)))
    assert compared == set(computed), "a gradient was not compared"


def set_b(golden: Golden) -> dict[str, torch.Tensor]:
    return {name: golden.tensors.ids(f"B.{name}") for name in ("input_ids", "attention_mask", "labels")}


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def computed_b(any_golden: Golden, request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    model = QWenLMHeadModel.from_pretrained(
        any_golden.tiny, dtype=torch.float32, attn_implementation=request.param
    ).train()
    return gradients(model, set_b(any_golden))


def test_set_b_gradients(any_golden: Golden, computed_b: dict[str, torch.Tensor]) -> None:
    assert_gradients(any_golden, "B.grad.", any_golden.tensors.ids("B.input_ids"), computed_b)


def test_set_b_gradient_norms(any_golden: Golden, computed_b: dict[str, torch.Tensor]) -> None:
    """The norms cover the rows that are not recorded."""
    expected = any_golden.notes["B.grad_norms"]
    norms = {name: gradient.norm().item() for name, gradient in computed_b.items()}
    assert norms == pytest.approx(expected, rel=GRADIENT_RTOL)
    total = torch.stack([gradient.norm() for gradient in computed_b.values()]).norm().item()
    assert total == pytest.approx(any_golden.notes["B.grad_total_norm"], rel=GRADIENT_RTOL)


def test_set_g_gradients(any_golden: Golden) -> None:
    tensors = any_golden.tensors
    for variant in sorted({name.split(".")[1] for name in tensors if name.startswith("G.")}):
        model = QWenLMHeadModel.from_pretrained(any_golden.path / variant, dtype=torch.float32).train()
        prefix = f"G.{variant}."
        inputs = {name: tensors.ids(prefix + name) for name in ("input_ids", "attention_mask", "labels")}
        computed = gradients(model, inputs)
        assert_gradients(any_golden, f"{prefix}grad.", inputs["input_ids"], computed)
        norms = {name: gradient.norm().item() for name, gradient in computed.items()}
        assert norms == pytest.approx(any_golden.notes[f"G.{variant} grad norms"], rel=GRADIENT_RTOL)


def test_tied_embeddings_have_one_gradient(golden_small: Path) -> None:
    model = QWenLMHeadModel.from_pretrained(golden_small / "tiny-qwen-tied", dtype=torch.float32)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # the oldest library lacks the new names
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(any_golden: Golden, use_reentrant: bool) -> None:
    inputs = set_b(any_golden)
    model = QWenLMHeadModel.from_pretrained(any_golden.tiny, dtype=torch.float32).train()
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    # As with LoRA, where no parameter before the first block needs a gradient.
    model.enable_input_require_grads()
    checkpointed = gradients(model, inputs)
    for name, gradient in plain.items():
        assert relative_difference(checkpointed[name], gradient) <= 1e-6, name
