"""The micro-batch of a run that takes most memory: from its data in the order of its sampler, else from its flags."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from chat.label_mask import IGNORE_INDEX
from planning.rehearsal import BatchShape
from training.config.args import RunArguments

_MOST_EPOCHS = 20  # whose orders are searched
_Items = Any  # an ExampleSet or PackedExamples


def assumed_batch(args: RunArguments) -> BatchShape:
    """Return the largest micro-batch that the flags allow: rows of ``--model_max_length``, every token a target."""
    size, length = args.trainer_value("per_device_train_batch_size"), args.data.model_max_length
    return BatchShape((length,) * size, targets=size * (length - 1))


class RunBatches:
    """The micro-batches of a run's training data.

    Args:
        items: what the run draws: examples, or packs of them.
        lengths: tokens of each item.
        is_padded: rows are padded to the longest of a micro-batch.
    """

    def __init__(self, items: _Items, lengths: Sequence[int], is_padded: bool) -> None:
        self.items, self.lengths, self.is_padded = items, np.asarray(lengths, dtype=np.int64), is_padded

    @classmethod
    def of_run(cls, args: RunArguments, processes: int) -> RunBatches:
        """Read a run's data, or open it in the cache of prepared data.

        Raises:
            ConfigError: a checkpoint without a usable tokenizer.
            DataError: a file or a record that cannot be used.
        """
        from loading.checkpoint import load_checkpoint
        from training.data import build_train_dataset, load_data
        from training.rows import why_padded
        from training.samplers import PackedExamples

        checkpoint = load_checkpoint(args.model.model_name_or_path, args.model.cache_dir, args.model.model_hub)
        sets = load_data(args, _flags(args, processes), checkpoint)
        items = build_train_dataset(args, checkpoint, sets["train"])
        lengths = items.pack_lengths() if isinstance(items, PackedExamples) else items.lengths
        return cls(items, lengths, bool(why_padded(args, checkpoint.config.to_dict())))

    def longest(self, args: RunArguments, processes: int) -> BatchShape:
        """Return the micro-batch with most positions of all processes and epochs, with its number of targets."""
        from training.samplers import build_sampler

        flags = _flags(args, processes)
        size = args.trainer_value("per_device_train_batch_size")
        sampler = build_sampler(flags, args.data.data_mixing, self.items, len(self.items))
        best, most = np.arange(min(size, len(self.lengths))), -1
        for epoch in range(_epochs(args, len(self.lengths), processes) if sampler else 0):
            sampler.set_epoch(epoch)  # type: ignore[union-attr]
            order = np.fromiter(sampler, dtype=np.int64)  # type: ignore[arg-type]
            positions = self._positions(order, size)
            chosen = int(positions.argmax())
            if positions[chosen] > most:
                best, most = order[chosen * size : (chosen + 1) * size], int(positions[chosen])
        if sampler is None:  # an order of transformers' own: the longest items may meet
            best = np.argsort(self.lengths)[-size:]
        return self._shape(best)

    def _positions(self, order: Any, size: int) -> Any:
        """Return the positions of each micro-batch of an order, whose last one may be smaller."""
        lengths = self.lengths[order]
        lengths = np.concatenate([lengths, np.zeros(-len(lengths) % size, dtype=np.int64)]).reshape(-1, size)
        return lengths.max(axis=1) * (lengths > 0).sum(axis=1) if self.is_padded else lengths.sum(axis=1)

    def _shape(self, chosen: Any) -> BatchShape:
        examples: list[Any] = []
        for item in (self.items[int(index)] for index in chosen):
            examples += item if isinstance(item, list) else [item]
        targets = sum(label != IGNORE_INDEX for example in examples for label in example["labels"][1:])
        return BatchShape(tuple(len(example["input_ids"]) for example in examples), targets)


def _flags(args: RunArguments, processes: int) -> Any:
    """Return transformers' flags with what ``TrainingArguments`` derives, which would start process groups."""
    size = args.trainer_value("per_device_train_batch_size")
    return cast(
        Any, SimpleNamespace(**{**vars(args.trainer_values()), "train_batch_size": size, "world_size": processes})
    )


def _epochs(args: RunArguments, items: int, processes: int) -> int:
    """Return the number of epochs that a run begins, at most ``_MOST_EPOCHS``."""
    get = args.trainer_value
    epochs = get("num_train_epochs")
    if get("max_steps") > 0:
        step = get("per_device_train_batch_size") * get("gradient_accumulation_steps") * processes
        epochs = get("max_steps") * step / items
    return min(max(1, math.ceil(epochs)), _MOST_EPOCHS)
