"""Batches: padding to the longest sample, attention mask from the lengths."""

from __future__ import annotations

import torch

from data_utils.collate import Collator
from data_utils.encode import Example
from tests.golden import Golden


def test_examples_are_padded_on_the_right_to_the_longest() -> None:
    examples: list[Example] = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8], "labels": [-100]},
    ]
    batch = Collator(9)(examples)
    assert batch.pop("num_targets") == 2
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "labels": [[-100, 6, 7], [-100, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_end_of_text_in_a_text_is_attended_and_trained_and_other_keys_are_dropped() -> None:
    example = {"input_ids": [5, 9, 9], "labels": [-100, 9, 9], "length": 3, "where": "file:1"}
    batch = Collator(9)([example])  # type: ignore[list-item]
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "num_targets"]
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 9, 9]]


def test_batch_equals_the_original(any_golden: Golden) -> None:
    """The original pads to max_length, ``Collator`` to the longest sample; up to that length they are equal."""
    golden = any_golden.load_json("chatml.json")
    recorded = golden["trainer_collated_batch_real_max64"]
    masks = recorded["attention_mask"]["values"]
    lengths = [max(position + 1 for position, real in enumerate(mask) if real) for mask in masks]
    examples = [
        {name: recorded[name]["values"][row][:length] for name in ("input_ids", "labels")}
        for row, length in enumerate(lengths)
    ]
    batch = Collator(golden["pad_token_id"])(examples)  # type: ignore[arg-type]

    longest = max(lengths)
    padding = {"input_ids": golden["pad_token_id"], "labels": -100, "attention_mask": 0}
    for name in padding:
        values = torch.tensor(recorded[name]["values"]).long()
        assert batch[name].shape == (len(lengths), longest)
        assert torch.equal(batch[name], values[:, :longest]), name
        assert (values[:, longest:] == padding[name]).all(), name


def test_attention_mask_differs_from_the_original_only_for_end_of_text_in_texts(any_golden: Golden) -> None:
    golden = any_golden.load_json("chatml.json")
    pad = golden["pad_token_id"]
    masked_by_original = 0
    for case in golden["cases"]:
        expected = case["expected"][str(golden["max_lens"][0])]
        if "error" in expected:
            continue
        ids = expected["input_ids"]
        [mask] = Collator(pad)([{"input_ids": ids, "labels": expected["labels"]}])["attention_mask"].tolist()
        assert mask == [1] * len(ids)
        assert expected["attention_mask"] == [int(id_ != pad) for id_ in ids]
        if 0 in expected["attention_mask"]:
            texts = [case["system_message"] or "", *(turn["value"] for turn in case["conversations"])]
            assert any("<|endoftext|>" in text for text in texts), case["tag"]
            masked_by_original += 1
    assert masked_by_original or any_golden.name == "large"


def test_a_row_holds_the_samples_one_after_the_other_without_padding() -> None:
    examples: list[Example] = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, -100], "loss_weights": [1.0, 0.5, 2.0], "index": 4},
        {"input_ids": [8], "labels": [8]},  # a blank of the last batch
        {"input_ids": [3, 4], "labels": [-100, 4], "index": 0},
    ]
    batch = Collator(9, is_padded=False)(examples)
    tensors = {name: batch.pop(name) for name in list(batch) if isinstance(batch[name], torch.Tensor)}
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "input_ids": [[5, 6, 7, 8, 3, 4]],
        "labels": [[-100, 6, -100, -100, -100, 4]],  # a sample's first token is predicted from nothing
        "loss_weights": [[1.0, 0.5, 2.0, 1.0, 1.0, 1.0]],
        "position_ids": [[0, 1, 2, 0, 0, 1]],
        "cu_seq_lens_q": [0, 3, 4, 6],
        "cu_seq_lens_k": [0, 3, 4, 6],
    }
    assert [tensors[name].dtype for name in ("position_ids", "cu_seq_lens_q")] == [torch.int64, torch.int32]
    assert batch == {
        "sequence_lengths": (3, 1, 2), "max_length_q": 3, "max_length_k": 3, "num_targets": 2, "index": [4, 0],
    }  # fmt: skip


def test_samples_of_a_pack_are_samples_of_the_row() -> None:
    examples: list[Example] = [
        {"input_ids": [at] * at, "labels": [-100] + [at] * (at - 1), "index": at} for at in (2, 3, 4)
    ]
    packed = Collator(9, is_padded=False)([examples[:2], examples[2]])
    for name, value in Collator(9, is_padded=False)(examples).items():
        assert torch.equal(packed[name], value) if isinstance(value, torch.Tensor) else packed[name] == value
