"""Behaviour that the original had wrong or lacked: left padding, caches, packed rows, loading."""

from __future__ import annotations

import pytest
import torch

from qwen_model.modeling_qwen import QWenLMHeadModel
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.golden import IGNORE, LOGITS_ATOL, LOSS_ATOL, Golden, assert_close


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(any_golden: Golden, request: pytest.FixtureRequest) -> QWenLMHeadModel:
    """The main checkpoint with 960 rows of its head: logits are independent of one another."""
    loaded = QWenLMHeadModel.from_pretrained(
        any_golden.tiny, dtype=torch.float32, attn_implementation=request.param
    ).eval()
    stride = loaded.config.vocab_size // 960
    loaded.lm_head.weight = torch.nn.Parameter(loaded.lm_head.weight[::stride].detach().clone())
    return loaded


def random_ids(model: QWenLMHeadModel, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (1, length), generator=generator)


def padded(rows: list[torch.Tensor], length: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows [1, t] with token 0 to one batch [B, length] with its mask."""
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        real = slice(0, row.shape[1]) if side == "right" else slice(length - row.shape[1], length)
        ids[index, real] = row[0]
        mask[index, real] = 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_equal_unpadded_ones(model: QWenLMHeadModel, side: str) -> None:
    """Also if only the padding exceeds ``seq_length``, and for rows below and above it."""
    seq_length = model.config.seq_length
    lengths = [3, seq_length // 2, seq_length - 1, seq_length, seq_length + 1, seq_length + 20]
    rows = [random_ids(model, length, seed) for seed, length in enumerate(lengths)]
    ids, mask = padded(rows, seq_length + 20, side)
    logits = model(input_ids=ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        unpadded = model(input_ids=row).logits[0]
        assert_close(logits[index, mask[index].bool()], unpadded, LOGITS_ATOL, f"{side}, {row.shape[1]} tokens")


@torch.no_grad()
def test_cached_equals_uncached_within_seq_length(model: QWenLMHeadModel) -> None:
    seq_length = model.config.seq_length
    ids = random_ids(model, seq_length)
    full = model(input_ids=ids).logits
    start = seq_length - 8
    output = model(input_ids=ids[:, :start], use_cache=True)
    assert_close(output.logits, full[:, :start], LOGITS_ATOL, "prefill")
    for position in range(start, seq_length):
        output = model(input_ids=ids[:, position : position + 1], past_key_values=output.past_key_values)
        assert_close(output.logits[:, 0], full[:, position], LOGITS_ATOL, f"position {position}")


@torch.no_grad()
def test_cached_equals_uncached_for_a_left_padded_batch(model: QWenLMHeadModel) -> None:
    """The mask alone gives each row of a batch its own positions while decoding."""
    rows = [random_ids(model, length, seed) for seed, length in enumerate([7, 20])]
    ids, mask = padded(rows, 20, "left")
    output = model(input_ids=ids[:, :15], attention_mask=mask[:, :15], use_cache=True)
    output = model(input_ids=ids[:, 15:18], attention_mask=mask[:, :18], past_key_values=output.past_key_values)
    output = model(input_ids=ids[:, 18:], attention_mask=mask, past_key_values=output.past_key_values)
    for index, row in enumerate(rows):
        assert_close(output.logits[index], model(input_ids=row).logits[0, -2:], LOGITS_ATOL, f"row {index}")


@torch.no_grad()
def test_cache_keeps_the_ntk_factor_of_its_prompt(model: QWenLMHeadModel) -> None:
    """Cached keys are rotated with it, so that a prompt beyond seq_length can be split."""
    seq_length = model.config.seq_length
    ids = random_ids(model, seq_length + 12)
    full = model(input_ids=ids).logits
    output = model(input_ids=ids[:, : seq_length + 4], use_cache=True)
    output = model(input_ids=ids[:, seq_length + 4 :], past_key_values=output.past_key_values)
    assert_close(output.logits, full[:, seq_length + 4 :], LOGITS_ATOL, "continued beyond seq_length")


def packed(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pack conversations into one row: ids, restarting positions, and an additive mask [1, 1, T, T]."""
    lengths = [row.shape[1] for row in rows]
    owners = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
    visible = (owners[:, None] == owners[None]).tril()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    return torch.cat(rows, dim=1), position_ids, mask[None, None]


@torch.no_grad()
@pytest.mark.parametrize("with_mask", [False, True])
def test_packed_logits_equal_separate_ones(any_golden: Golden, model: QWenLMHeadModel, with_mask: bool) -> None:
    """In training mode; the packed row exceeds seq_length. The original ignored position_ids."""
    seq_length = model.config.seq_length
    rows = [random_ids(model, length, seed) for seed, length in enumerate([5, seq_length - 2, 1, 17])]
    ids, position_ids, mask = packed(rows)
    assert ids.shape[1] > seq_length
    model.train()
    try:
        logits = model(
            input_ids=ids, position_ids=position_ids, attention_mask=mask if with_mask else None, use_cache=False
        ).logits
        separate = torch.cat([model(input_ids=row).logits for row in rows], dim=1)
    finally:
        model.eval()
    assert_close(logits, separate, LOGITS_ATOL, "packed")


@torch.no_grad()
def test_position_ids_are_used(model: QWenLMHeadModel) -> None:
    ids = random_ids(model, 12)
    plain = model(input_ids=ids).logits
    positions = torch.arange(12)[None]
    assert_close(model(input_ids=ids, position_ids=positions).logits, plain, 1e-6, "default positions")
    # Rotary positions are relative: shifting all of them changes nothing, scaling them does.
    assert_close(model(input_ids=ids, position_ids=positions + 9).logits, plain, LOGITS_ATOL, "shifted")
    assert (model(input_ids=ids, position_ids=positions * 2).logits - plain).abs().max() > 0.01


@torch.no_grad()
def test_logits_to_keep(model: QWenLMHeadModel) -> None:
    ids = random_ids(model, 9)
    full = model(input_ids=ids).logits
    assert_close(model(input_ids=ids, logits_to_keep=2).logits, full[:, -2:], 1e-5, "the last two")


def test_loss_is_divided_by_num_items_in_batch(any_golden: Golden, tiny_model: QWenLMHeadModel) -> None:
    """Trainer counts the targets of a whole optimizer step; with the batch's own count the loss is the mean."""
    model, tensors = tiny_model, any_golden.tensors
    labels = tensors.ids("B.labels")
    inputs = {"input_ids": tensors.ids("B.input_ids"), "attention_mask": tensors.ids("B.attention_mask")}
    targets = int((labels[:, 1:] != IGNORE).sum())
    mean = model(**inputs, labels=labels).loss
    for count in (targets, torch.tensor(targets)):
        assert_close(model(**inputs, labels=labels, num_items_in_batch=count).loss, mean, 1e-6, "own count")
    halved = model(**inputs, labels=labels, num_items_in_batch=2 * targets).loss
    assert halved.item() == pytest.approx(mean.item() / 2, rel=1e-6)


def test_rows_without_a_target_do_not_count(any_golden: Golden, tiny_model: QWenLMHeadModel) -> None:
    """The original's loss of a batch without targets is NaN, which makes all weights NaN."""
    assert any_golden.notes["loss when every label is -100"] == "nan"
    model, tensors = tiny_model, any_golden.tensors
    ids, labels = tensors.ids("B.input_ids"), tensors.ids("B.labels")
    no_targets = torch.full_like(labels, IGNORE)
    loss = model(input_ids=ids, labels=no_targets).loss
    assert loss.item() == 0.0
    loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    with_empty_row = model(input_ids=ids, labels=torch.cat([labels[:1], no_targets[1:]])).loss
    assert_close(with_empty_row, model(input_ids=ids[:1], labels=labels[:1]).loss, LOSS_ATOL, "an empty row")


@torch.no_grad()
def test_loading_leaves_nothing_uninitialised(any_golden: Golden) -> None:
    """from_pretrained can leave buffers outside the file uninitialised: fill freed memory with NaN, load, compare."""
    ids = any_golden.tensors.ids("C.input_ids")
    logits = []
    for _ in range(2):
        garbage = [torch.full((size,), float("nan")) for size in (8, 64, 512, 4096, 32768, 262144) for _ in range(50)]
        del garbage
        model = QWenLMHeadModel.from_pretrained(any_golden.tiny, dtype=torch.float32).eval()
        assert list(model.buffers()) == []
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
        logits.append(model(input_ids=ids, logits_to_keep=3).logits)
    assert torch.equal(logits[0], logits[1])


def test_initialisation_of_a_new_model(any_golden: Golden) -> None:
    """Norms are one, biases zero, matrices small and random; equal seeds give equal weights."""
    config = QWenLMHeadModel.from_pretrained(any_golden.tiny).config
    config.vocab_size = 50
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(QWenLMHeadModel(config).state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        if "ln_" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif name.endswith("bias"):
            assert torch.equal(tensor, torch.zeros_like(tensor)), name
        else:
            assert 0.2 * config.initializer_range < tensor.std() < 1.2 * config.initializer_range, name


@pytest.mark.parametrize("space", [" ", "\t", "\u00a0"])
def test_too_many_spaces_are_refused(space: str, tiny_tokenizer: QWenTokenizer) -> None:
    """A million of them crash the process inside tiktoken."""
    for encode in (tiny_tokenizer.encode_plain, tiny_tokenizer):
        with pytest.raises(ValueError, match="900,000 or more spaces in a row, which cannot be tokenised"):
            encode(f"a{space * 900_000}b")
    many = f"a{space * 899_999}b"
    assert tiny_tokenizer.decode(tiny_tokenizer.encode_plain(many)) == many
