"""Examples to the tensors of a batch.

B samples of a batch, T tokens of its longest sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from chat.label_mask import IGNORE_INDEX
from data_utils.encode import Example


class Collator:
    """Pads examples on the right to the longest of them.

    The attention mask comes from the lengths: padding is ``<|endoftext|>``, which may also stand in a text.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """``input_ids``, ``labels`` and ``attention_mask``, int64 [B, T]; ``num_targets``, an int; where examples have
        them, ``loss_weights``, float32 [B, T], and ``index``, a list.

        Other keys of the examples are dropped.
        """
        shape = (len(examples), max(len(example["input_ids"]) for example in examples))
        batch: dict[str, Any] = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORE_INDEX),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
        }
        if any("loss_weights" in example for example in examples):
            batch["loss_weights"] = torch.ones(shape)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            batch["input_ids"][row, :length] = torch.as_tensor(example["input_ids"])
            batch["labels"][row, :length] = torch.as_tensor(example["labels"])
            batch["attention_mask"][row, :length] = 1
            if (weights := example.get("loss_weights")) is not None:
                batch["loss_weights"][row, :length] = torch.as_tensor(weights)
        # Counted here, where it costs nothing; on a GPU somebody would have to wait for it.
        batch["num_targets"] = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        if indices := [example["index"] for example in examples if "index" in example]:  # blanks have none
            batch["index"] = indices  # a list stays on the host
        return batch
