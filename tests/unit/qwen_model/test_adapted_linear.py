"""Projections of a block equal calling its layers: outputs, gradients and dropout, for every kind of adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from qwen_model import adapter_dropout, products
from qwen_model.adapted_linear import project, project_gated
from qwen_model.adapter_dropout import AdapterDropout, use_adapter_dropout

SIZE, WIDTH = 24, 40


class Layers(nn.Module):
    """The linear layers of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 8), nn.Linear(SIZE, 8, bias=False)
        self.gate, self.up = nn.Linear(SIZE, WIDTH, bias=False), nn.Linear(SIZE, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, SIZE)


def build(targets: str = "q k v gate up down", dropout: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=targets.split(), **options)
    model: Any = get_peft_model(Layers(), config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
        elif "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
    use_adapter_dropout(model.modules())
    return model.train()


def call(hidden: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Call layers with the same random numbers: those with a common input share its dropout."""
    outputs, state = [], torch.get_rng_state()
    for layer in layers:
        torch.set_rng_state(state)
        outputs.append(layer(hidden))
    return tuple(outputs)


def call_in_turn(hidden: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    return tuple(layer(hidden) for layer in layers)


def call_gated(gate: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
    return layer(F.silu(gate) * up)


def outputs_of(model: Any, hidden: Tensor, project: Any = project, project_gated: Any = project_gated) -> list[Tensor]:
    layers = model.base_model.model
    gate, up = project(hidden.flip(-1), [layers.gate, layers.up])
    return [*project(hidden, [layers.q, layers.k, layers.v]), gate, up, project_gated(gate, up, layers.down)]


def results(
    model: Any, *functions: Any, dtype: torch.dtype = torch.float32, autocast: torch.dtype | None = None
) -> Any:
    """Return outputs, and gradients by name, for the same inputs and random numbers each time."""
    torch.manual_seed(1)
    hidden = torch.randn(2, 5, SIZE).to(dtype).requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        outputs = outputs_of(model, hidden, *functions)
    model.zero_grad()
    sum((output.float() * torch.randn_like(output, dtype=torch.float32)).sum() for output in outputs).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs, {"hidden": hidden.grad} | gradients


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to that of the expected tensor."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).double().norm() / expected.double().norm().clamp(min=1e-30))


def compare(model: Any, tolerance: float = 1e-6, call: Any = call, **precision: Any) -> list[Tensor]:
    expected_outputs, expected = results(model, call, call_gated, **precision)
    outputs, gradients = results(model, **precision)
    for output, wanted in zip(outputs, expected_outputs, strict=True):
        assert difference(output, wanted) < tolerance
    assert gradients.keys() == expected.keys()
    assert not (wrong := {n: difference(gradients[n], expected[n]) for n in expected
                          if difference(gradients[n], expected[n]) >= tolerance}), wrong  # fmt: skip
    return outputs


def is_fused(output: Tensor) -> bool:
    return type(output.grad_fn).__name__ == "_ProjectionBackward"


@pytest.fixture(params=["torch", "oneDNN"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute with both libraries for products; the second one is used for large ones."""
    if request.param == "oneDNN":
        monkeypatch.setattr(products, "LARGE", 1)


FUSED: dict[str, Callable[[], Any]] = {
    "adapters on all layers": build,
    "dropout": lambda: build(dropout=0.3),
    "dropout in evaluation": lambda: build(dropout=0.3).eval(),
    "rank-stabilised scale": lambda: build(use_rslora=True),
    "biases of all layers": lambda: build(bias="all"),
    "biases of adapters": lambda: build(lora_bias=True),
    "adapters on some layers": lambda: build("q v up"),
    "frozen adapters": lambda: build(dropout=0.3).requires_grad_(False),
    "frozen first matrices": lambda: freeze(build(dropout=0.3), "lora_A"),
    "frozen second matrices": lambda: freeze(build(dropout=0.3), "lora_B"),
    "ranks by layer": lambda: build(rank_pattern={"q": 2, "down": 3}),
    "disabled adapters": lambda: change(build(), lambda model: model.base_model.disable_adapter_layers()),
    "merged adapters": lambda: change(build(), lambda model: model.merge_adapter()),
}


def freeze(model: Any, part: str) -> Any:
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(False)
    return model


def change(model: Any, function: Callable[[Any], object]) -> Any:
    function(model)
    return model


@pytest.mark.parametrize("name", FUSED)
def test_results_are_those_of_the_layers(name: str) -> None:
    *_, down = compare(FUSED[name]())
    assert is_fused(down)


def test_devices_whose_dropout_saves_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random numbers are those of peft's own dropout."""
    monkeypatch.setattr(adapter_dropout, "_draws_gaps", lambda x: False)
    model = build(dropout=0.3)
    outputs = compare(model)
    for module in model.modules():
        if type(module) is AdapterDropout:
            module.__class__ = nn.Dropout
    assert all(difference(o, n) < 1e-6 for o, n in zip(outputs, results(model, call, call_gated)[0], strict=True))


def with_hook(part: str, method: str = "register_forward_hook") -> Any:
    model = build()
    layer: Any = model.base_model.model.down
    parts = {"wrapper": layer, "base": layer.base_layer, "dropout": layer.lora_dropout["default"]}
    module = (parts | {"down": layer.lora_A["default"], "up": layer.lora_B["default"]})[part]
    getattr(module, method)(lambda *args: None)
    return model


def with_second_adapter() -> Any:
    model = build()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["down"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    return model


def set_forward(layer: Any) -> None:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


CALLED: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: build(use_dora=True),
    "two adapters": with_second_adapter,
    "trained copy": lambda: build("q k v gate up", modules_to_save=["down"]),
    "another dropout": lambda: change(
        build(dropout=0.3),
        lambda model: setattr(model.base_model.model.down.lora_dropout["default"], "__class__", Other),
    ),
    "a forward of its own": lambda: change(build(), lambda model: set_forward(model.base_model.model.down)),
    "a forward of the base": lambda: change(build(), lambda model: set_forward(model.base_model.model.down.base_layer)),
    **{f"hook on {part}": lambda part=part: with_hook(part) for part in ("wrapper", "base", "dropout", "down", "up")},
    "pre-hook": lambda: with_hook("base", "register_forward_pre_hook"),
    "backward hook": lambda: with_hook("up", "register_full_backward_hook"),
}


class Other(nn.Dropout):
    """A dropout whose random numbers are unknown."""


@pytest.mark.parametrize("name", CALLED)
def test_layers_with_more_than_a_plain_adapter_are_called(name: str) -> None:
    model = CALLED[name]()
    *_, down = compare(model)
    assert not is_fused(down)


def test_disabled_adapters_that_are_merged_are_unmerged_as_by_a_call() -> None:
    model = build("q")
    layer, hidden = model.base_model.model.q, torch.randn(3, SIZE)
    expected = layer.base_layer(hidden)
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    (output,) = project(hidden, [layer])
    assert difference(output, expected) < 1e-6 and not layer.merged


def test_layers_of_a_group_that_are_called_keep_the_order_of_random_numbers() -> None:
    model = build(dropout=0.3)
    model.base_model.model.k.register_forward_hook(lambda *args: None)
    for layer in (model.base_model.model.gate, model.base_model.model.up):
        layer.lora_dropout["default"].p = 0.0
    query, key, value, *_ = compare(model, call=call_in_turn)
    assert is_fused(query) and is_fused(value) and not is_fused(key)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trained", [True, False])
def test_layers_without_adapters(trained: bool, autocast: bool) -> None:
    torch.manual_seed(0)
    layers: Any = Layers().requires_grad_(trained)
    found = []
    for functions in ((call, call_gated), (project, project_gated)):
        hidden = torch.ones(3, 4, SIZE, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = outputs_of(wrapped(layers), hidden, *functions)
        tensors = [hidden, *(layers.parameters() if trained else ())]
        loss = torch.cat(outputs, -1).float().sin().sum()
        found.append([*outputs, *torch.autograd.grad(loss, tensors)])
    assert all(map(is_fused, found[1][:6]))
    tolerance = 2e-2 if autocast else 1e-6
    assert all(difference(ours, theirs) < tolerance for ours, theirs in zip(found[1], found[0], strict=True))


def wrapped(layers: nn.Module) -> Any:
    """Return layers as the base of a model with adapters is found."""
    return SimpleNamespace(base_model=SimpleNamespace(model=layers))


def test_frozen_layers_do_not_keep_their_input() -> None:
    layers: Any = Layers().requires_grad_(False)
    hidden, saved = torch.randn(3, 50, SIZE, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        outputs = project(hidden, [layers.q, layers.k])
    assert all(map(is_fused, outputs)) and hidden.shape not in saved


def test_trained_weights_are_not_kept_in_a_second_precision() -> None:
    """Autocast keeps a copy of each weight for the backward pass."""
    layers: Any = Layers()
    saved: list[torch.dtype] = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor.dtype) or tensor, lambda tensor: tensor
        ),
    ):
        outputs = project(torch.randn(3, SIZE), [layers.q, layers.k, layers.v])
    assert outputs[0].dtype == torch.bfloat16 and saved == [torch.bfloat16, *[torch.float32] * 3]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_differs_by_rounding(dtype: torch.dtype, autocast: bool, dropout: float) -> None:
    """As near to float32 as calling the layers is."""
    model = build(dropout=dropout).to(dtype)
    precise = copy.deepcopy(model).float()
    for parameter in model.parameters():
        if autocast and parameter.requires_grad:
            parameter.data = parameter.data.float()
    options = {"dtype": dtype, "autocast": dtype if autocast else None}
    exact_outputs, exact = results(precise, call, call_gated)
    plain_outputs, plain = results(model, call, call_gated, **options)
    outputs, gradients = results(model, **options)
    assert all(map(is_fused, outputs))
    assert [g.dtype for g in gradients.values()] == [g.dtype for g in plain.values()]
    ours, theirs = ([*o, *g.values()] for o, g in ((outputs, gradients), (plain_outputs, plain)))
    limit = 4 * torch.finfo(dtype).eps
    for tensor, other, wanted in zip(ours, theirs, [*exact_outputs, *exact.values()], strict=True):
        error = difference(tensor.float(), wanted)
        assert error < min(limit, 1.5 * difference(other.float(), wanted) + limit / 8)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_saved_tensors_are_the_input_the_inner_products_and_the_dropped_positions(dropout: float) -> None:
    model = build(dropout=dropout)
    layers, rows = model.base_model.model, 50
    known = {p.data_ptr() for p in model.parameters()}
    hidden = torch.randn(1, rows, SIZE, requires_grad=True)
    gate, up = (torch.randn(1, rows, WIDTH, requires_grad=True) for _ in range(2))

    def saved_by(function: Callable[[], object]) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in known:
                sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = function()
        del result
        return sum(sizes.values())

    def positions(values: int) -> float:
        return 4 * (dropout * values + 8 * (dropout * values) ** 0.5 + 17) if dropout else 0

    size = saved_by(lambda: project(hidden, [layers.q, layers.k, layers.v]))
    assert size <= 4 * rows * (SIZE + 3 * 4) + positions(rows * SIZE)
    size = saved_by(lambda: project_gated(gate, up, layers.down))
    assert size <= 4 * rows * (2 * WIDTH + 4) + positions(rows * WIDTH)
    assert size < saved_by(lambda: call_gated(gate, up, layers.down)) * (0.6 if dropout else 0.65)


def test_evaluation_saves_nothing() -> None:
    model = build()
    with torch.no_grad():
        outputs = outputs_of(model, torch.randn(2, SIZE))
        expected = outputs_of(model, torch.randn(2, SIZE), call, call_gated)
    assert all(output.grad_fn is None for output in outputs) and len(outputs) == len(expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_repeats_dropout(reentrant: bool) -> None:
    model = build(dropout=0.3)

    def run(hidden: Tensor) -> Tensor:
        return torch.cat(outputs_of(model, hidden), -1)

    found = []
    for function in (run, lambda hidden: checkpoint(run, hidden, use_reentrant=reentrant)):
        torch.manual_seed(1)
        hidden = torch.ones(3, SIZE, requires_grad=True)
        model.zero_grad()
        function(hidden).sin().sum().backward()
        found.append([hidden.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert all(map(torch.equal, *found))


def test_layer_that_is_used_twice_gets_both_gradients() -> None:
    model = build("q")
    layer, hidden = model.base_model.model.q, torch.randn(3, SIZE)
    found = []
    for function in (call, project):
        model.zero_grad()
        (first,) = function(hidden, [layer])
        (second,) = function(first.tanh(), [layer])
        second.sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(difference(ours, theirs) < 1e-6 for ours, theirs in zip(found[1], found[0], strict=True))


def test_unused_outputs_and_inputs_without_gradient_cost_none() -> None:
    model = build()
    layers: Any = model.base_model.model
    query, _, _ = project(torch.randn(3, SIZE), [layers.q, layers.k, layers.v])
    query.sum().backward()
    assert layers.q.lora_A["default"].weight.grad is not None
    assert layers.k.lora_A["default"].weight.grad is None


def test_adapters_with_different_dropout_do_not_share_it() -> None:
    model = build(dropout=0.3)
    model.base_model.model.k.lora_dropout["default"].p = 0.5
    for layer in (model.base_model.model.gate, model.base_model.model.up):
        layer.lora_dropout["default"].p = 0.0
    assert all(map(is_fused, compare(model, call=call_in_turn)))


def test_second_derivative_is_refused() -> None:
    hidden = torch.randn(3, SIZE, requires_grad=True)
    (output,) = project(hidden, [build().base_model.model.q])
    (gradient,) = torch.autograd.grad(output.sin().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("autocast", [True, False])
def test_shapes_are_enough(autocast: bool) -> None:
    """Nothing is read from the data: neither dropout nor anything else needs it."""
    model = build(dropout=0.3)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = torch.empty(2, 5, SIZE, requires_grad=True)
        torch.cat(outputs_of(model, hidden), -1).sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
