"""Fast blocks: the outputs and gradients of the classes that they replace, for every architecture."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from data_utils.collate import Collator
from qwen_model.architectures import ARCHITECTURES
from qwen_model.fast_blocks import use_fast_blocks
from qwen_model.lean_models import model_class_of
from qwen_model.sample_attention import take_rows
from tests.unit.qwen_model.test_sample_attention import MODELS, SIZES, samples

MODES = ("full", "LoRA", "checkpointed LoRA", "evaluation")


def build_pair(name: str, attention: str = "sdpa", **changes: Any) -> tuple[Any, Any]:
    """Return two models with the same weights, the second with fast blocks."""
    model_type, of_name = MODELS[name]
    torch.manual_seed(0)
    model_class = model_class_of(model_type)
    plain = model_class(
        model_class.config_class(
            **SIZES | {"initializer_range": 0.1} | of_name | changes, attn_implementation=attention
        )
    )
    for parameter_name, parameter in plain.named_parameters():
        if "norm" in parameter_name or "ln_" in parameter_name:
            nn.init.normal_(parameter, 1, 0.2)
    plain.config.use_cache = False
    take_rows(plain)
    fast = copy.deepcopy(plain)
    use_fast_blocks(fast)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    return plain, fast


def with_adapter(model: Any) -> Any:
    """Return the model with an adapter on all linear layers of its blocks, whose second matrices are not zero."""
    torch.manual_seed(1)
    targets = list(ARCHITECTURES[model.config.model_type].lora_targets)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def batch_of(is_padded: bool) -> dict[str, Any]:
    known = {"input_ids", "labels", "attention_mask", "position_ids", "sequence_lengths"}
    batch = Collator(0, is_padded)(samples())
    return {name: batch[name] for name in known & batch.keys()}


def results_of(model: Any, batch: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the loss and the gradients of a model."""
    torch.manual_seed(2)  # of the dropout
    loss = model(**batch, loss_only=True, num_items_in_batch=7).loss
    yield "loss", loss.detach()
    if loss.requires_grad:
        loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad


def assert_equal(plain: Any, fast: Any, batch: dict[str, Any], limit: float = 2e-6) -> None:
    expected, actual = dict(results_of(plain, batch)), dict(results_of(fast, batch))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        assert (actual[name] - value).norm() <= limit * value.norm(), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_padded", [False, True], ids=["row", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_classes(name: str, attention: str, is_padded: bool, mode: str) -> None:
    models = build_pair(name, attention)
    if "LoRA" in mode:
        models = with_adapter(models[0]), with_adapter(models[1])
    for model in models:
        model.train(mode != "evaluation")
        if mode == "evaluation":
            model.requires_grad_(False)
        if "checkpointed" in mode:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
    # The first output of a delta net is a small product of query and key, whose rounding its norm makes larger.
    assert_equal(*models, batch_of(is_padded), 5e-5 if "linear_num_key_heads" in MODELS[name][1] else 2e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precision_differs_by_rounding(name: str, weights: torch.dtype) -> None:
    exact, _ = build_pair(name)
    pair = [model.to(weights) for model in build_pair(name)]
    batch = batch_of(is_padded=False)
    expected = dict(results_of(exact, batch))
    with torch.autocast("cpu", torch.bfloat16):
        plain, fast = (dict(results_of(model, batch)) for model in pair)
    for tensor_name, value in expected.items():
        errors = [(results[tensor_name].float() - value).norm() for results in (plain, fast)]
        assert fast[tensor_name].dtype == plain[tensor_name].dtype
        assert errors[1] <= 1.5 * errors[0] + 2**-7 * value.norm(), tensor_name


@pytest.mark.parametrize("name", MODELS)
def test_answers_with_a_cache_are_those_of_the_classes(name: str) -> None:
    prompt = {"input_ids": torch.tensor([samples()[0]["input_ids"]]), "attention_mask": torch.ones(1, 9)}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    answers = [model.eval().generate(**prompt, **options) for model in build_pair(name)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_of_the_attention_are_returned_where_they_are_asked_for(name: str) -> None:
    inputs = {"input_ids": torch.tensor([samples()[0]["input_ids"]]), "output_attentions": True}
    plain, fast = (model(**inputs) for model in build_pair(name, "eager"))
    kinds = MODELS[name][1].get("layer_types", ["full_attention"] * SIZES["num_hidden_layers"])
    assert len(fast.attentions) == kinds.count("full_attention")
    for one, other in zip(fast.attentions, plain.attentions, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_copy_a_pickled_model_and_what_is_saved_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    _, fast = build_pair(name)
    batch = batch_of(is_padded=False)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        other.load_state_dict(fast.state_dict())
        assert_equal(fast, other, batch, limit=0)
        fast.zero_grad()
    fast.save_pretrained(tmp_path)
    assert "Fast" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    loaded = type(fast).from_pretrained(tmp_path)
    assert not [module for module in loaded.modules() if type(module).__name__.startswith("Fast")]


def test_modules_that_are_not_known_keep_their_forward() -> None:
    class OtherMLP(nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            return states * 2

    _, fast = build_pair("qwen2", hidden_act="gelu")
    fast.model.layers[0].mlp = OtherMLP()
    use_fast_blocks(fast)
    kinds = [type(layer.mlp).__name__ for layer in fast.model.layers]
    assert kinds == ["OtherMLP", "Qwen2MLP"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hooks_and_replaced_forwards_of_modules_are_called(name: str) -> None:
    plain, fast = build_pair(name)
    calls: list[int] = []
    for index, model in enumerate((plain, fast)):
        for module in model.modules():
            if isinstance(module, nn.Linear) or "RMSNorm" in type(module).__name__:
                module.register_forward_hook(lambda module, args, output, index=index: calls.append(index))
        dict(results_of(model, batch_of(is_padded=False)))
    assert calls.count(0) == calls.count(1) > 14


@pytest.mark.parametrize("is_in_place", [True, False])
def test_hooks_may_change_the_output_of_a_norm(is_in_place: bool) -> None:
    models = build_pair("qwen2")
    for model in models:
        norm = model.model.layers[1].post_attention_layernorm
        norm.register_forward_hook(lambda module, args, output: output.mul_(2) if is_in_place else output * 2)
    assert_equal(*models, batch_of(is_padded=False))


@pytest.mark.parametrize(
    ("name", "floats"),
    # Norms: input and root; projections: nothing more. Attention: queries, keys, values, output, and a sum per head.
    [("qwen", 32 * 6 + 4 + 2), ("qwen2", 32 * 4 + 16 * 2 + 4 + 2), ("qwen3", 32 * 5 + 16 * 3 + 4 + 2 + 4 + 2)],
)
def test_what_a_block_without_mlp_keeps_per_token(name: str, floats: int) -> None:
    _, fast = build_pair(name)
    block = fast.get_submodule(ARCHITECTURES[name].blocks)[0]
    block.mlp = nn.Identity()
    kept: dict[int, Any] = {}
    excluded = {parameter.untyped_storage().data_ptr() for parameter in fast.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage  # alive, so that no other gets its place
        return tensor

    batch = {name: value for name, value in batch_of(is_padded=False).items() if name != "labels"}
    arguments: dict[str, Any] = {}
    block.register_forward_pre_hook(
        lambda module, args, kwargs: arguments.update(states=args[0], **kwargs), with_kwargs=True
    )
    fast(**batch)
    states = arguments.pop("states").detach().requires_grad_()
    tables = arguments.get("position_embeddings") or arguments["rotary"]
    excluded |= {table.untyped_storage().data_ptr() for table in tables}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = block(states, **arguments)
    assert output is not None and sum(storage.nbytes() for storage in kept.values()) == 4 * floats * states.shape[1]
