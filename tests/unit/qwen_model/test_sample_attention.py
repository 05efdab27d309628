"""Rows of several samples: each sample's results are those that it has alone, for every architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_utils.collate import Collator
from qwen_model import sample_attention
from qwen_model.architectures import ARCHITECTURES
from qwen_model.lean_models import model_class_of
from qwen_model.sample_attention import take_rows
from tests.models import DELTA_NETS

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "kv_channels": 8, "seq_length": 64, "max_position_embeddings": 512,
    "initializer_range": 0.2,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
# Name, model_type, changes of the config.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, DELTA_NETS if name.startswith("qwen3_5") else {}) for name in ARCHITECTURES},
    "qwen2, as many heads of keys": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2, sliding window": ("qwen2", WINDOW),
}
# Two of equal length that are no neighbours, one of a single token.
LENGTHS = (9, 5, 1, 9, 30)


@pytest.fixture(scope="module", params=[(name, attention) for name in MODELS for attention in ("sdpa", "eager")])
def model(request: pytest.FixtureRequest) -> Any:
    name, attention = request.param
    return build(*MODELS[name], attention)


def build(model_type: str, changes: dict[str, Any], attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model_class = model_class_of(model_type)
    model = model_class(model_class.config_class(**SIZES | changes, attn_implementation=attention)).eval()
    take_rows(model)
    return model


def samples(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Any]:
    """Return random examples of which some labels are no targets, with weights."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(SIZES["vocab_size"], (length,), generator=generator)
        labels = ids.masked_fill(torch.rand(length, generator=generator) < 0.3, -100)
        weights = torch.rand(length, generator=generator) + 0.5
        examples.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "loss_weights": weights.tolist()})
    return examples


def as_row(examples: list[Any], *names: str) -> dict[str, Any]:
    """Return the row of examples without its labels, or with these of its other entries."""
    batch = Collator(0, is_padded=False)(examples)
    others = {"labels", "loss_weights", "num_targets"} - set(names)
    return {name: value for name, value in batch.items() if name not in others}


@torch.no_grad()
def logits_of_row(model: Any, examples: list[Any]) -> list[Tensor]:
    logits: Tensor = model(**as_row(examples)).logits[0]
    return list(logits.split([len(example["input_ids"]) for example in examples]))


@torch.no_grad()
def logits_alone(model: Any, examples: list[Any]) -> list[Tensor]:
    return [model(input_ids=torch.tensor([example["input_ids"]])).logits[0] for example in examples]


def test_logits_of_each_sample_in_a_row_are_those_it_has_alone(model: Any) -> None:
    for actual, expected in zip(logits_of_row(model, samples()), logits_alone(model, samples()), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_changing_one_sample_leaves_the_others_bit_identical(model: Any) -> None:
    examples, changed = samples(), samples()
    changed[1] = samples(LENGTHS, seed=1)[1]
    before, after = logits_of_row(model, examples), logits_of_row(model, changed)
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False, True, True, True]


@pytest.mark.parametrize(
    ("is_checkpointed", "options", "names"),
    [
        (False, {"loss_only": True}, ("num_targets",)),
        (True, {"loss_only": True}, ("num_targets", "loss_weights")),
        (True, {"loss_only": True, "label_smoothing": 0.1}, ("loss_weights",)),
        (False, {}, ()),
        (False, {}, ("loss_weights",)),
    ],
    ids=["lean", "checkpointed, weighted", "smoothed", "full logits", "full logits, weighted"],
)
def test_gradients_of_a_row_are_those_of_the_padded_batch(
    model: Any, is_checkpointed: bool, options: dict[str, Any], names: tuple[str, ...]
) -> None:
    model.train()
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    try:
        results = []
        for is_padded in (True, False):
            batch = Collator(0, is_padded)(samples())
            known = {"input_ids", "labels", "attention_mask", "position_ids", "sequence_lengths", *names}
            output = model(**{name: batch[name] for name in known & batch.keys()}, **options, num_items_in_batch=7)
            model.zero_grad()
            output.loss.backward()
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            results.append((output.loss.item(), output.get("num_correct"), gradients))
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    (padded_loss, padded_correct, padded), (loss, correct, of_row) = results
    assert (loss, correct) == (pytest.approx(padded_loss, rel=1e-6), padded_correct)
    for name, expected in padded.items():
        assert (of_row[name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_no_tensor_has_the_size_of_the_row_squared(model: Any) -> None:
    lengths = LENGTHS * 2  # longer than any other size
    row, length = as_row(samples(lengths), "labels", "num_targets"), sum(lengths)
    with recorded_shapes() as shapes:
        model(**row, loss_only=True).loss.backward()
    assert (1, length, SIZES["hidden_size"]) in shapes
    assert not [shape for shape in shapes if sum(size >= length for size in shape) > 1]


@contextmanager
def recorded_shapes() -> Iterator[set[tuple[int, ...]]]:
    """Record the shapes of all tensors that operators return."""
    shapes: set[tuple[int, ...]] = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    shapes.add(tuple(tensor.shape))
            return result

    with Recorder():
        yield shapes


@pytest.mark.parametrize("changes", [{}, {"use_logn_attn": False}, {"use_dynamic_ntk": False}])
def test_ntk_and_logn_follow_each_sample_beyond_the_trained_length(changes: dict[str, Any]) -> None:
    lengths = (20, 3, 40, 16, 17)  # NTK factors 3, 1, 7, 1 and 3
    models = [build("qwen", {"seq_length": length, **changes}) for length in (16, 128)]
    examples = samples(lengths)
    rows, alone, unscaled = (logits_of_row(models[0], examples), logits_alone(models[0], examples),
                             logits_alone(models[1], examples))  # fmt: skip
    for length, row, expected, plain in zip(lengths, rows, alone, unscaled, strict=True):
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)
        assert torch.allclose(row, plain, atol=1e-4) == (length <= 16)


def test_training_uses_neither_ntk_nor_logn() -> None:
    short, long = (build("qwen", {"seq_length": length}).train() for length in (16, 128))
    for one, other in zip(logits_of_row(short, samples()), logits_of_row(long, samples()), strict=True):
        assert torch.equal(one, other)


def test_padded_batches_and_generation_are_those_of_the_plain_model(model: Any) -> None:
    plain = type(model)(type(model.config)(**model.config.to_dict()))
    plain.load_state_dict(model.state_dict())
    plain.eval().set_attn_implementation(model.config._attn_implementation.removesuffix("_by_sample"))
    batch = {name: Collator(0)(samples())[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    prompt = {"input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}
    answers = [each.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=0) for each in (model, plain)]
    assert torch.equal(*answers)


def test_saved_config_does_not_name_the_attention(tmp_path: Path) -> None:
    for model_type in ARCHITECTURES:
        build(model_type, {}).save_pretrained(tmp_path / model_type)
        text = (tmp_path / model_type / "config.json").read_text(encoding="utf-8")
        assert "by_sample" not in text and json.loads(text)["model_type"] == model_type


def test_a_model_that_would_mix_samples_refuses_rows() -> None:
    model = build("qwen2", {})
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="'sdpa' would mix the samples of a row"):
        logits_of_row(model, samples())


@pytest.mark.parametrize("name", ["qwen", "qwen3", "qwen2, sliding window"])
def test_one_kernel_of_torch_gets_all_samples_of_a_row_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(*MODELS[name])
    expected = logits_of_row(model, samples())
    calls = []

    def varlen(
        query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, longest: int, longest_key: int,
        *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        """What torch documents, without a GPU."""
        calls.append(window_size)
        assert starts.dtype == torch.int32 and starts.tolist() == key_starts.tolist() == [0, 9, 14, 15, 24, 54]
        assert longest == longest_key == 30 and enable_gqa == (query.shape[1] != key.shape[1])
        rows = []
        for begin, end in pairwise(starts.tolist()):
            q, k, v = (states[begin:end].transpose(0, 1) for states in (query, key, value))
            distances = torch.arange(len(q[0]))[:, None] - torch.arange(len(q[0]))
            visible = (distances >= 0) & ((distances <= window_size[0]) | (window_size[0] == -1))
            output = F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=enable_gqa)
            rows.append(output.transpose(0, 1))
        return torch.cat(rows)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    monkeypatch.setattr(sample_attention, "_runs_varlen", lambda query: True)
    for actual, wanted in zip(logits_of_row(model, samples()), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
    assert calls == [(-1, 0), (3, 0) if "window" in name else (-1, 0)]
