"""The 8-bit caches: what they keep, how far off it is, and rows that come, go and are joined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from errors import ConfigError
from qwen_model.kv_cache import (
    CACHE_KINDS,
    EightBitLayer,
    Fp8Layer,
    Int8Layer,
    build_cache,
    cache_bytes,
)
from qwen_model.modeling_qwen import QWenLMHeadModel
from tests.golden import SMALL, Golden, sets_with
from tests.models import write_later_checkpoint

TINY = SMALL / "tiny-qwen-small"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def filled(layer: EightBitLayer, states: torch.Tensor) -> torch.Tensor:
    """Return what a layer gives back for states that it has kept."""
    layer.update(states, states)
    keys, _ = layer.update(states[:, :, :0], states[:, :, :0])
    return keys


def kept_greedy(
    model: Any, prompt: torch.Tensor, kind: str | None, mask: torch.Tensor | None = None
) -> list[list[int]]:
    mask = torch.ones_like(prompt) if mask is None else mask
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.0}
    settings |= {"eos_token_id": None, "pad_token_id": 0, "past_key_values": build_cache(model.config, kind)}
    output = model.generate(prompt, attention_mask=mask, **settings)
    rows: list[list[int]] = output[:, prompt.shape[1] :].tolist()
    return rows


@sets_with(r"(E)\.fdata")
def test_codes_are_those_of_the_original_rounded_instead_of_cut(any_golden: Golden) -> None:
    """Its step and zero point are those of all tokens of a call, so the tokens of a head are one row here."""
    tensors = any_golden.tensors
    states = tensors["E.fdata"]
    codes, step, low = Int8Layer().quantize(states.flatten(2))
    expected = tensors["E.qdata"].flatten(2)
    assert torch.allclose(step, tensors["E.scale"][:, :, 0]) and torch.allclose(-low / step, tensors["E.zero"][:, :, 0])
    difference = codes.int() - expected.int()
    assert difference.min() >= 0 and difference.max() == 1 and 0.3 < difference.float().mean() < 0.7
    ours = (Int8Layer().dequantize(codes, step, low) - states.flatten(2)).abs()
    theirs = (tensors["E.dequantized"] - states).abs()
    assert (ours <= step * 0.5001).all() and ours.mean() < 0.6 * theirs.mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layer", "error"), [(Int8Layer, 0.5 / 255), (Fp8Layer, 0.5 / 8)], ids=CACHE_KINDS)
def test_error_is_at_most_half_a_step_of_each_key(layer: type[EightBitLayer], error: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states = (torch.randn(2, 3, 50, 16) * torch.logspace(-3, 3, 50)[:, None] + 0.3).to(dtype)
    kept = filled(layer(), states)
    assert kept.dtype == dtype
    if layer is Int8Layer:
        allowed = error * (states.amax(-1) - states.amin(-1)).float()
    else:
        allowed = error * states.float().abs().amax(-1)
    allowed = allowed + torch.finfo(dtype).eps * states.float().abs().amax(-1)  # of the result's rounding
    assert ((kept.float() - states.float()).abs().amax(-1) <= allowed).all()


@pytest.mark.parametrize("layer", [Int8Layer, Fp8Layer])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.5, -3.0])
def test_constant_states_are_kept(layer: type[EightBitLayer], dtype: torch.dtype, value: float) -> None:
    states = torch.full((1, 2, 3, 8), value, dtype=dtype)
    assert torch.allclose(filled(layer(), states), states, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_states_of_the_call_are_exact_and_quantised_once(kind: str) -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 2, 7, 8)
    layer = build_cache(QWenLMHeadModel.from_pretrained(TINY).config, kind).layers[0]
    assert torch.equal(layer.update(states[:, :, :4], states[:, :, :4])[0], states[:, :, :4])
    first = layer.keys.clone()
    keys, values = layer.update(states[:, :, 4:], states[:, :, 4:])
    assert torch.equal(keys[:, :, 4:], states[:, :, 4:]) and torch.equal(values, keys)
    assert torch.equal(layer.keys[:, :, :4], first) and layer.get_seq_length() == 7
    whole = build_cache(QWenLMHeadModel.from_pretrained(TINY).config, kind).layers[0]
    whole.update(states, states)
    assert torch.equal(whole.keys, layer.keys), "in one call or in two"


@pytest.mark.parametrize(("kind", "size"), [(None, 32), ("int8", 20), ("fp8", 18)])
def test_bytes_of_a_bfloat16_cache(kind: str | None, size: int) -> None:
    """Of each token, head, and of keys and values: 16 numbers, with two parameters or one of two bytes."""
    model = QWenLMHeadModel.from_pretrained(TINY, dtype=torch.bfloat16).eval()
    size = size - 16 if kind is None else size - 8  # heads of 8
    cache = build_cache(model.config, kind)
    with torch.no_grad():
        model(torch.arange(30).view(2, 15), past_key_values=cache)
    assert cache_bytes(cache) == 2 * model.config.num_hidden_layers * model.config.num_attention_heads * 30 * size


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = {"qwen": QWenLMHeadModel.from_pretrained(TINY, dtype=torch.float32).eval()}
    for model_type in ("qwen2", "qwen3"):
        folder: Path = tmp_path_factory.mktemp(model_type) / "model"
        found[model_type] = AutoModelForCausalLM.from_pretrained(write_later_checkpoint(folder, model_type)).eval()
    return found


@pytest.mark.parametrize("kind", CACHE_KINDS)
@pytest.mark.parametrize("model_type", ["qwen", "qwen2", "qwen3"])
@torch.no_grad()
def test_joined_rows_answer_as_alone_and_rows_can_leave(models: dict[str, Any], model_type: str, kind: str) -> None:
    model = models[model_type]
    torch.manual_seed(1)
    prompts = [torch.randint(0, 700, (1, length)) for length in (3, 40, 11)]
    alone = [kept_greedy(model, prompt, kind)[0] for prompt in prompts]

    outputs = [model(prompt, past_key_values=build_cache(model.config, kind)) for prompt in prompts]
    cache, *others = [output.past_key_values for output in outputs]
    for other, padding, other_padding in zip(others, (37, 0), (0, 29), strict=True):
        for layer, other_layer in zip(cache.layers, other.layers, strict=True):
            layer.join(other_layer, padding, other_padding)
    mask = torch.stack([torch.nn.functional.pad(torch.ones(p.shape[1]), (40 - p.shape[1], 0)) for p in prompts]).long()
    rows, answers = [0, 1, 2], [[int(output.logits[0, -1].argmax())] for output in outputs]
    for step in range(19):
        if step == 6:  # the longest row leaves, the others change places and lose the padding that they share
            rows, mask = [2, 0], mask[[2, 0], 29:]
            cache.batch_select_indices(torch.tensor(rows))
            for layer in cache.layers:
                layer.cut_left(29)
        mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long)], dim=1)
        ids = torch.tensor([[answers[row][-1]] for row in rows])
        positions = mask.sum(-1, keepdim=True) - 1
        logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        for index, row in enumerate(rows):
            answers[row].append(int(logits[index, -1].argmax()))
    assert answers[0] == alone[0] and answers[2] == alone[2] and answers[1] == alone[1][:7]


@pytest.mark.parametrize("kind", CACHE_KINDS)
@pytest.mark.parametrize("model_type", ["qwen", "qwen2"])
@torch.no_grad()
def test_left_padding_changes_no_answer(models: dict[str, Any], model_type: str, kind: str) -> None:
    model = models[model_type]
    prompts = torch.arange(24).view(2, 12) * 7
    mask = torch.ones_like(prompts)
    mask[1, :8] = 0
    both = kept_greedy(model, prompts, kind, mask)
    assert both == [*kept_greedy(model, prompts[:1], kind), *kept_greedy(model, prompts[1:, 8:], kind)]


@pytest.mark.parametrize("kind", CACHE_KINDS)
@torch.no_grad()
def test_cropped_and_reordered_as_other_caches(models: dict[str, Any], kind: str) -> None:
    """Beams reorder rows; removed tokens are as if they had never been."""
    model = models["qwen2"]
    prompt = torch.arange(10)[None] * 5
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(prompt, num_beams=3, **settings)
    cache = build_cache(model.config, kind)
    assert torch.equal(model.generate(prompt, num_beams=3, past_key_values=cache, **settings), plain)
    kept = [layer.values[:, :, :6].clone() for layer in cache.layers]
    cache.crop(6 - cache.get_seq_length())
    assert all(torch.equal(layer.values, values) for layer, values in zip(cache.layers, kept, strict=True))


def test_unknown_kind_is_refused(models: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--kv_cache int4 is not a kind of cache\. Use int8 or fp8"):
        build_cache(models["qwen"].config, "int4")


@sets_with(r"(D\d+)\.greedy")
def test_greedy_answers_of_the_goldens_are_mostly_equal(tiny_model: QWenLMHeadModel, any_golden: Golden) -> None:
    """With int8 all but one, which differs later than the original's own quantised cache and at a small margin."""
    tensors = any_golden.tensors
    equal = 0
    for case in any_golden.cases(r"(D\d+)\.greedy"):
        expected = tensors[f"{case}.greedy"].tolist()
        answer = kept_greedy(tiny_model, tensors.ids(f"{case}.prompt"), "int8")[0]
        first = same_tokens(answer, expected)
        assert first == 20 or tensors[f"{case}.greedy_top2_margin"][first] < 0.005, case
        equal += first == 20
        if f"E.{case}.greedy" in tensors:
            assert first > same_tokens(tensors[f"E.{case}.greedy"].tolist(), expected)
    assert equal >= len(any_golden.cases(r"(D\d+)\.greedy")) - 1


def same_tokens(ours: list[int], theirs: list[int]) -> int:
    """Return after how many tokens two answers of one length differ."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((index for index, (one, other) in pairs if one != other), len(ours))
