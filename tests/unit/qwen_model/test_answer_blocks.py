"""Blocks of a model that only answers have the results of the models' own classes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loading.checkpoint import load_checkpoint
from loading.inference import load_for_inference
from qwen_model import answer_blocks
from qwen_model.answer_blocks import use_answer_blocks
from qwen_model.kv_cache import build_cache
from qwen_model.packed_linear import PackedLinear
from tests.adapters import LINEAR, make_adapter
from tests.models import write_later_checkpoint
from tests.serving import load_base, write_checkpoint

NO_MASK = dict.fromkeys(("full_attention", "sliding_attention", "linear_attention"))


@pytest.fixture(scope="module", params=["qwen", "qwen2", "qwen3", "qwen3_5_text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_base(write_checkpoint(tmp_path_factory.mktemp("answers") / request.param, request.param))


def logits_of(model: Any) -> list[torch.Tensor]:
    """Return the logits of two prompts, one padded on the left, of further parts of them, and of single tokens."""
    torch.manual_seed(3)
    ids = torch.randint(256, 600, (2, 11))
    columns = torch.arange(11)
    mask = torch.stack([torch.ones(11), columns >= 3]).long()
    cache, logits = build_cache(model.config), []
    with torch.inference_mode():
        for start, end in ((0, 5), (5, 8), (8, 9), (9, 10), (10, 11)):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
            logits.append(
                model(
                    input_ids=ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions,
                    past_key_values=cache, use_cache=True,
                ).logits
            )  # fmt: skip
        logits.append(model(input_ids=ids[:1, :4], attention_mask=NO_MASK, position_ids=columns[None, :4]).logits)
    return [logits[0][:1], logits[0][1:, 3:], *logits[1:]]  # without those of padding


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_the_models_own_classes(model: Any, attention: str) -> None:
    model.set_attn_implementation(attention)
    answering = copy.deepcopy(model)
    use_answer_blocks(answering)
    blocks = [module for module in answering.modules() if hasattr(module, "joined")]
    own = {type(module) for module in model.modules()}
    assert len(blocks) >= 7 and not {type(each) for each in blocks} & own
    for got, expected in zip(logits_of(answering), logits_of(model), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_packed_weights_change_logits_by_rounding_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch has no FBGEMM for this processor")
    model.set_attn_implementation("sdpa")
    exact = logits_of(model)
    own, answering = (copy.deepcopy(model).bfloat16() for _ in range(2))
    monkeypatch.setattr(answer_blocks, "is_slow", lambda weight: weight.dtype == torch.bfloat16)
    use_answer_blocks(answering)
    assert not [module for module in answering.modules() if type(module) is nn.Linear]
    assert isinstance(answering.lm_head, PackedLinear)
    for got, plain, expected in zip(logits_of(answering), logits_of(own), exact, strict=True):
        error, usual = (each.float() - expected for each in (got, plain))
        assert error.square().mean() < 1.5 * usual.square().mean()


def test_layers_with_hooks_are_called(tmp_path: Path) -> None:
    model = load_base(write_checkpoint(tmp_path, "qwen3"))
    expected = logits_of(model)
    attention = model.model.layers[0].self_attn
    seen: list[nn.Module] = []
    attention.q_proj.register_forward_hook(lambda module, args, output: seen.append(module))
    use_answer_blocks(model)
    for got, wanted in zip(logits_of(model), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    assert seen == [attention.q_proj] * 6  # one for each call
    assert not hasattr(model.model.layers[1].self_attn, "q_proj")


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "embeddings": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
    "rows": {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [300, 301, 302]}},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_on_packed_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch has no FBGEMM for this processor")
    base = write_later_checkpoint(tmp_path / "base", "qwen2", tied=name == "rows", dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", **ADAPTERS[name])
    own = load_for_inference(load_checkpoint(str(base)), str(adapter))
    exact, answering = copy.deepcopy(own).float(), copy.deepcopy(own)
    monkeypatch.setattr(answer_blocks, "is_slow", lambda weight: weight.dtype == torch.bfloat16)
    use_answer_blocks(answering)
    adapted = [layer for path, layer in answering.named_modules() if path.endswith("q_proj.base_layer")]
    assert {isinstance(layer, PackedLinear) for layer in adapted} == {name != "dora"}
    for got, plain, expected in zip(*map(logits_of, (answering, own, exact)), strict=True):
        error, usual = (each.float() - expected for each in (got, plain))
        assert error.square().mean() < 1.5 * usual.square().mean()
