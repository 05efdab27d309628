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

    The attention mask is computed from the lengths: the padding id, ``<|endoftext|>``, may also occur in a text.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return a batch. Other keys of the examples are dropped.

        Returns:
            ``input_ids``, ``labels`` and ``attention_mask``, int64 [B, T]; ``num_targets``, an int; if examples have
            them, ``loss_weights``, float32 [B, T], and ``index``, a list.
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
        # Counted here on the CPU; on a GPU the count would force a synchronisation.
        batch["num_targets"] = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        if indices := [example["index"] for example in examples if "index" in example]:  # fillers have no index
            batch["index"] = indices  # a list is not moved to the GPU
        return batch
