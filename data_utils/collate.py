"""Examples to the tensors of a batch.

B samples of a batch, T tokens of its longest sample, N tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from chat.label_mask import IGNORE_INDEX
from data_utils.encode import Example


class Collator:
    """Makes a batch of examples: one row without padding, or rows that are padded on the right to the longest.

    In a row the samples follow one another, and positions begin anew with each; attention needs ``sequence_lengths``
    to keep them apart. The attention mask of padded rows is computed from the lengths: the padding id,
    ``<|endoftext|>``, may also occur in a text.
    """

    def __init__(self, pad_token_id: int, is_padded: bool = True) -> None:
        self.pad_token_id, self.is_padded = pad_token_id, is_padded

    def __call__(self, items: Sequence[Example | list[Example]]) -> dict[str, Any]:
        """Return the batch of examples or of packs, which are lists of examples. Other keys of examples are dropped.

        Returns:
            ``input_ids`` and ``labels``, int64 [B, T] or [1, N]; ``num_targets``, an int; if examples have them,
            ``loss_weights``, float32, and ``index``, a list.
            Padded: ``attention_mask``, int64 [B, T].
            A row: ``position_ids``, int64 [1, N]; ``sequence_lengths``, B ints; and the same as transformers names it
            for flash attention: ``cu_seq_lens_q`` and ``_k``, int32 [B + 1], and ``max_length_q`` and ``_k``, ints.
        """
        examples: list[Example] = []
        for item in items:
            examples += item if isinstance(item, list) else [item]
        lengths = tuple(len(example["input_ids"]) for example in examples)
        if self.is_padded:
            shape, starts = (len(examples), max(lengths)), [0] * len(examples)
            batch: dict[str, Any] = {
                "attention_mask": (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
            }
        else:
            shape, starts = (1, sum(lengths)), [0, *accumulate(lengths)][:-1]
            batch = _places(lengths)
        batch |= {"input_ids": torch.full(shape, self.pad_token_id), "labels": torch.full(shape, IGNORE_INDEX)}
        if any("loss_weights" in example for example in examples):
            batch["loss_weights"] = torch.ones(shape)
        for sample, (example, start, length) in enumerate(zip(examples, starts, lengths, strict=True)):
            place = (sample if self.is_padded else 0, slice(start, start + length))
            for name in ("input_ids", "labels", "loss_weights"):
                if (values := example.get(name)) is not None:
                    batch[name][place] = torch.as_tensor(values)
        if not self.is_padded:  # the position before it is of another sample
            batch["labels"][0, starts] = IGNORE_INDEX
        # Counted here on the CPU; on a GPU the count would force a synchronisation.
        batch["num_targets"] = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        if indices := [example["index"] for example in examples if "index" in example]:  # fillers have no index
            batch["index"] = indices  # a list is not moved to the GPU
        return batch


def _places(lengths: tuple[int, ...]) -> dict[str, Any]:
    """Return where the samples of a row are."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "sequence_lengths": lengths,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
