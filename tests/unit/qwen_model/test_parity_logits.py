"""Forward passes against the original's: logits, hidden states, keys and values, losses, rotary and log-n tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qwen_model.modeling_qwen import QWenLMHeadModel
from qwen_model.rope import logn_scale, ntk_alpha, rotary_tables
from tests.golden import LOGITS_ATOL, LOSS_ATOL, Golden, assert_close, assert_logits, sets_with


def load(folder: Path, attention: str, **overrides: object) -> QWenLMHeadModel:
    """Load a checkpoint in float32 and evaluation mode, with some config keys changed."""
    return QWenLMHeadModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, **overrides
    ).eval()


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(any_golden: Golden, attention: str) -> QWenLMHeadModel:
    loaded = load(any_golden.tiny, attention)
    assert loaded.config._attn_implementation == attention
    return loaded


def variant_overrides(variant: str) -> dict[str, bool]:
    return {"use_dynamic_ntk": "ntk1" in variant, "use_logn_attn": "logn1" in variant}


@torch.no_grad()
def test_set_a_logits_hidden_states_and_cache(model: QWenLMHeadModel, any_golden: Golden) -> None:
    tensors = any_golden.tensors
    output = model(input_ids=tensors.ids("A.input_ids"), use_cache=True, output_hidden_states=True)
    assert_logits(output.logits, tensors, "A.eval")
    assert_close(output.logits[:, -1], tensors["A.eval.logits_full_last"], LOGITS_ATOL, "A.eval.logits_full_last")
    assert len(output.hidden_states) == any_golden.notes["A.n_hidden_states"]
    for index, states in enumerate(output.hidden_states):
        assert_close(states, tensors[f"A.hidden_states.{index}"], LOGITS_ATOL, f"A.hidden_states.{index}")
    for layer in range(model.config.num_hidden_layers):
        cached = output.past_key_values.layers[layer]
        # Ours are [B, H, T, D], the original's [B, T, H, D].
        assert_close(cached.keys.transpose(1, 2), tensors[f"A.past_key.{layer}"], LOGITS_ATOL, f"key {layer}")
        assert_close(cached.values.transpose(1, 2), tensors[f"A.past_value.{layer}"], LOGITS_ATOL, f"value {layer}")


@torch.no_grad()
def test_inputs_embeds_give_the_logits_of_input_ids(model: QWenLMHeadModel, any_golden: Golden) -> None:
    embeddings = model.get_input_embeddings()(any_golden.tensors.ids("A.input_ids"))
    assert_logits(model(inputs_embeds=embeddings).logits, any_golden.tensors, "A.eval")


@torch.no_grad()
@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool])
def test_set_b_right_padding(model: QWenLMHeadModel, any_golden: Golden, mask_dtype: torch.dtype) -> None:
    tensors = any_golden.tensors
    mask = tensors["B.attention_mask"].to(mask_dtype)
    output = model(input_ids=tensors.ids("B.input_ids"), attention_mask=mask, labels=tensors.ids("B.labels"))
    assert_logits(output.logits, tensors, "B.eval")
    assert_close(output.loss, tensors["B.eval.loss"], LOSS_ATOL, "B.eval.loss")


@torch.no_grad()
def test_set_b_without_a_mask(model: QWenLMHeadModel, any_golden: Golden) -> None:
    tensors = any_golden.tensors
    output = model(input_ids=tensors.ids("B.input_ids"), labels=tensors.ids("B.labels"))
    assert_logits(output.logits, tensors, "B.eval_nomask")
    assert_close(output.loss, tensors["B.eval_nomask.loss"], LOSS_ATOL, "B.eval_nomask.loss")


@torch.no_grad()
def test_set_b_left_padding(model: QWenLMHeadModel, any_golden: Golden) -> None:
    tensors = any_golden.tensors
    mask = tensors.ids("B.left.attention_mask")
    assert not mask[:, 0].all() and mask[:, -1].all()
    logits = model(input_ids=tensors.ids("B.left.input_ids"), attention_mask=mask).logits
    assert_logits(logits, tensors, "B.left.eval", where=mask)


@torch.no_grad()
def test_set_b_hole_in_the_mask(model: QWenLMHeadModel, any_golden: Golden) -> None:
    tensors = any_golden.tensors
    mask = tensors.ids("B.hole.attention_mask")
    assert ((mask[:, 1:-1] == 0) & (mask[:, :-2] == 1) & (mask[:, 2:] == 1)).any()
    assert_logits(model(input_ids=tensors.ids("B.input_ids"), attention_mask=mask).logits, tensors, "B.hole.eval")


@torch.no_grad()
def test_set_b_training_loss(model: QWenLMHeadModel, any_golden: Golden) -> None:
    tensors = any_golden.tensors
    inputs = {"input_ids": tensors.ids("B.input_ids"), "attention_mask": tensors.ids("B.attention_mask")}
    model.train()
    try:
        loss = model(**inputs, labels=tensors.ids("B.labels")).loss
    finally:
        model.eval()
    assert_close(loss, tensors["B.train.loss"], LOSS_ATOL, "B.train.loss")


@sets_with(r"C\.(ntk\d_logn\d)\.eval\.loss")
@torch.no_grad()
def test_set_c_beyond_seq_length(any_golden: Golden, attention: str) -> None:
    tensors = any_golden.tensors
    inputs = {"input_ids": tensors.ids("C.input_ids"), "labels": tensors.ids("C.labels")}
    for variant in any_golden.cases(r"C\.(ntk\d_logn\d)\.eval\.loss"):
        model = load(any_golden.tiny, attention, **variant_overrides(variant))
        assert inputs["input_ids"].shape[1] > model.config.seq_length

        output = model(**inputs)
        assert_logits(output.logits, tensors, f"C.{variant}.eval")
        assert_close(output.loss, tensors[f"C.{variant}.eval.loss"], LOSS_ATOL, f"C.{variant}.eval.loss")

        # Training has neither dynamic NTK nor log-n, so all variants are equal.
        output = model.train()(**inputs)
        assert_logits(output.logits, tensors, "C.train")
        assert_close(output.loss, tensors[f"C.{variant}.train.loss"], LOSS_ATOL, f"C.{variant}.train.loss")


@sets_with(r"C2\.(ntk\d_logn\d)\.eval\.logits_s\d+")
@torch.no_grad()
def test_set_c2_each_row_has_its_own_ntk_factor(any_golden: Golden, attention: str) -> None:
    tensors = any_golden.tensors
    for variant in any_golden.cases(r"C2\.(ntk\d_logn\d)\.eval\.logits_s\d+"):
        model = load(any_golden.tiny, attention, **variant_overrides(variant))
        ids, mask = tensors.ids("C2.input_ids"), tensors.ids("C2.attention_mask")
        alpha = ntk_alpha(mask.sum(-1), model.config.seq_length) if model.config.use_dynamic_ntk else torch.ones(1)
        assert alpha.tolist() == any_golden.notes[f"C2.{variant} alpha list"]
        assert_logits(model(input_ids=ids, attention_mask=mask).logits, tensors, f"C2.{variant}.eval", where=mask)


@sets_with(r"C2\.(.*nomask)\.logits_s\d+")
@torch.no_grad()
def test_set_c2_without_a_mask_rows_share_the_ntk_factor(any_golden: Golden, attention: str) -> None:
    tensors = any_golden.tensors
    for case in any_golden.cases(r"C2\.(.*nomask)\.logits_s\d+"):
        model = load(any_golden.tiny, attention, **variant_overrides(case))
        assert_logits(model(input_ids=tensors.ids("C2.input_ids")).logits, tensors, f"C2.{case}")


@sets_with(r"C6\.(ntk\d_logn\d)\.eval\.logits_s\d+")
@torch.no_grad()
def test_set_c6_large_ntk_factor(any_golden: Golden, attention: str) -> None:
    for variant in any_golden.cases(r"C6\.(ntk\d_logn\d)\.eval\.logits_s\d+"):
        model = load(any_golden.tiny, attention, **variant_overrides(variant))
        ids = any_golden.tensors.ids("C6.input_ids")
        alpha = ntk_alpha(torch.tensor([ids.shape[1]]), model.config.seq_length)
        assert alpha.tolist() == any_golden.notes["C6 alpha list"]
        assert_logits(model(input_ids=ids).logits, any_golden.tensors, f"C6.{variant}.eval")


@sets_with(r"G\.([^.]+)\.logits")
@torch.no_grad()
def test_set_g_other_architectures(any_golden: Golden, attention: str) -> None:
    tensors = any_golden.tensors
    for variant in any_golden.cases(r"G\.([^.]+)\.logits"):
        model = load(any_golden.path / variant, attention)
        inputs = {"input_ids": tensors.ids(f"G.{variant}.input_ids"), "labels": tensors.ids(f"G.{variant}.labels")}
        mask = tensors.ids(f"G.{variant}.attention_mask")
        output = model(**inputs, attention_mask=mask)
        assert_close(output.logits, tensors[f"G.{variant}.logits"], LOGITS_ATOL, f"G.{variant}.logits")
        assert_close(output.loss, tensors[f"G.{variant}.loss"], LOSS_ATOL, f"G.{variant}.loss")
        long_ids = tensors.ids(f"G.{variant}.long.input_ids")
        assert long_ids.shape[1] > model.config.seq_length
        assert_logits(model(input_ids=long_ids).logits, tensors, f"G.{variant}.long")


@sets_with(r"(D\d+\.chunk\d+_then\d+)\.logits_s\d+")
@torch.no_grad()
def test_several_tokens_after_a_cache_attend_causally(model: QWenLMHeadModel, any_golden: Golden) -> None:
    """In the original they attended to each other in both directions; here a split forward equals a whole one."""
    tensors = any_golden.tensors
    for case in any_golden.cases(r"(D\d+\.chunk\d+_then\d+)\.logits_s\d+"):
        name, stride = tensors.strided(f"{case}.logits")
        prompt, first, second = re.fullmatch(r"(D\d+)\.chunk(\d+)_then(\d+)", case).groups()  # type: ignore[union-attr]
        ids, cached = tensors.ids(f"{prompt}.prompt")[:, : int(first) + int(second)], int(first)
        past = model(input_ids=ids[:, :cached], use_cache=True).past_key_values
        chunk = model(input_ids=ids[:, cached:], past_key_values=past, use_cache=True).logits
        assert_close(chunk, model(input_ids=ids).logits[:, cached:], LOGITS_ATOL, "chunk against the full forward")
        difference = (chunk[:, :, ::stride] - tensors[name]).abs().amax(dim=(0, 2))
        # In the original only the last token attended to the same tokens, and only in the first layer.
        assert difference.min() > 0.1


@sets_with(r"(F\.B\.bf16)\.loss")
@torch.no_grad()
def test_bfloat16_is_close_to_the_original(any_golden: Golden) -> None:
    """In half precision results agree only up to rounding."""
    tensors = any_golden.tensors
    any_golden.cases(r"(F\.B\.bf16)\.loss")
    model = QWenLMHeadModel.from_pretrained(any_golden.tiny, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    mask = tensors.ids("B.attention_mask")
    output = model(input_ids=tensors.ids("B.input_ids"), attention_mask=mask, labels=tensors.ids("B.labels"))
    name, stride = tensors.strided("F.B.bf16.eval.logits")
    real = mask.bool()
    assert_close(output.logits[:, :, ::stride][real], tensors[name][real], 0.2, name)
    assert_close(output.loss, tensors["F.B.bf16.loss"], 0.02, "F.B.bf16.loss")
    # In bfloat16 the resolution of the loss would be 0.06 here.
    assert output.loss.dtype == torch.float32


def test_ntk_factor_of_every_length(any_golden: Golden) -> None:
    seq_length = any_golden.config["seq_length"]
    table = any_golden.notes[f"alpha(len) with seq_length {seq_length}"]
    lengths = torch.tensor([int(length) for length in table])
    assert ntk_alpha(lengths, seq_length).tolist() == list(table.values())


def test_logn_of_every_position(any_golden: Golden) -> None:
    tensors = any_golden.tensors
    (name,) = (name for name in tensors if name.startswith("logn_tensor_first_"))
    expected = tensors[name]
    scale = logn_scale(torch.arange(len(expected))[None], any_golden.config["seq_length"])[0]
    assert_close(scale, expected, 1e-6, name)


@sets_with(r"rope\.alpha(\d+)\.cos")
def test_rotary_tables(any_golden: Golden) -> None:
    config = any_golden.config
    for alpha in any_golden.cases(r"rope\.alpha(\d+)\.cos"):
        expected_cos = any_golden.tensors[f"rope.alpha{alpha}.cos"]
        expected_sin = any_golden.tensors[f"rope.alpha{alpha}.sin"]
        position_ids = 37 * torch.arange(len(expected_cos))[None]
        shape = (config["kv_channels"], config["rotary_emb_base"])
        cos, sin = rotary_tables(position_ids, *shape, torch.tensor([int(alpha)]))
        # Angles reach 600 rad, where float32 has a resolution of 6e-5.
        assert_close(cos[0], expected_cos, 1e-4, "cos")
        assert_close(sin[0], expected_sin, 1e-4, "sin")
        if alpha == "1":
            without_alpha = rotary_tables(position_ids, *shape)
            assert torch.equal(without_alpha[0], cos) and torch.equal(without_alpha[1], sin)
