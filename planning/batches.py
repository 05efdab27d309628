"""The micro-batch of a run that takes most memory: from its data in the order of its sampler, else from its flags.

Where micro-batches of a step are joined, it is the longest row of joined ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from chat.label_mask import IGNORE_INDEX
from errors import ConfigError
from planning.rehearsal import BatchShape
from training.config.args import RunArguments
from training.rows import why_apart, why_padded

_MOST_EPOCHS = 20  # whose orders are searched
_MOST_BATCHES = 10**12
_MOST_TOKENS = 2**24  # of a micro-batch: far more than fit on any device
_Items = Any  # an ExampleSet or PackedExamples


def assumed_batch(args: RunArguments) -> BatchShape:
    """Return the largest micro-batch that the flags allow: rows of ``--model_max_length``, every token a target."""
    return _full_rows("per_device_train_batch_size", args)


def _full_rows(flag: str, args: RunArguments) -> BatchShape:
    size, length = args.trainer_value(flag), args.data.model_max_length
    if size * length > _MOST_TOKENS:
        what = f"--{flag} {size} x --model_max_length {length} are {size * length:,} tokens, too many to be rehearsed"
        raise ConfigError(what, f"Give up to {_MOST_TOKENS:,} tokens")
    return BatchShape((length,) * size, targets=size * (length - 1))


def assumed_evaluation(args: RunArguments) -> BatchShape | None:
    """Return the largest batch of an evaluation that the flags allow; ``None`` for a run that never evaluates."""
    if args.trainer_value("eval_strategy") == "no" and not args.trainer_value("eval_on_start"):
        return None
    return _full_rows("per_device_eval_batch_size", args)


class RunBatches:
    """The micro-batches of a run's training data.

    Args:
        items: what the run draws: examples, or packs of them; ``lengths`` are their tokens.
        is_padded: rows are padded to the longest of a micro-batch.
        evaluated: examples of evaluations, if there are any.
    """

    def __init__(self, items: _Items, is_padded: bool, evaluated: _Items | None = None) -> None:
        self.items, self.is_padded, self.evaluated = items, is_padded, evaluated

    @classmethod
    def of_run(cls, args: RunArguments, processes: int) -> RunBatches:
        """Read a run's data, or open it in the cache of prepared data. Weights may be missing.

        Raises:
            ConfigError: a checkpoint without a usable tokenizer.
            DataError: a file or a record that cannot be used.
        """
        from training.base import load_base
        from training.data import build_train_dataset, load_data

        checkpoint = load_base(args, reads_weights=False)
        sets = load_data(args, _flags(args, processes), checkpoint)
        is_padded = bool(why_padded(args, checkpoint.config.to_dict()))
        return cls(build_train_dataset(args, checkpoint, sets["train"]), is_padded, sets.get("eval"))

    def longest(self, args: RunArguments, processes: int) -> BatchShape:
        """Return the micro-batch with most positions of all processes and epochs, joined as in the run."""
        from training.longest_batch import epoch_orders, find_longest, positions_of
        from training.samplers import build_sampler

        get, lengths = args.trainer_value, self.items.lengths
        size, joining = get("per_device_train_batch_size"), self._joining(args, processes)
        sampler = build_sampler(_flags(args, processes), args.data.data_mixing, self.items, len(lengths))
        if sampler is None:  # an order of transformers' own: the longest items may meet
            return _shape(self.items, _longest_items(self.items, size))
        has_limit = get("max_steps") > 0
        limit = get("max_steps") * get("gradient_accumulation_steps") * processes if has_limit else _MOST_BATCHES
        epochs = _MOST_EPOCHS if has_limit else min(math.ceil(get("num_train_epochs")), _MOST_EPOCHS)
        orders = epoch_orders(sampler, range(epochs))
        longest = find_longest(lengths, orders, size, self.is_padded, limit, joining)
        [first] = epoch_orders(sampler, [0])
        per_step = joining.rows_per_step(positions_of(lengths, first, size, self.is_padded))
        return replace(_shape(self.items, longest.indices), per_step=per_step)

    def _joining(self, args: RunArguments, processes: int) -> Any:
        from training.joined_rows import Joining, token_budget

        get = args.trainer_value
        is_apart = self.is_padded or bool(why_apart(args, processes))
        budget = 0 if is_apart else token_budget(self.items.lengths, get("per_device_train_batch_size"))
        return Joining(budget, get("gradient_accumulation_steps"), processes)

    def longest_evaluation(self, args: RunArguments) -> BatchShape | None:
        """Return a batch of the longest examples of evaluations; ``None`` for a run that never evaluates."""
        if self.evaluated is None or assumed_evaluation(args) is None:
            return None
        return _shape(self.evaluated, _longest_items(self.evaluated, args.trainer_value("per_device_eval_batch_size")))


def _longest_items(items: _Items, size: int) -> list[int]:
    lengths = items.lengths
    return sorted(range(len(items)), key=lengths.__getitem__)[-size:]


def _shape(items: _Items, chosen: Sequence[int]) -> BatchShape:
    examples: list[Any] = []
    for item in (items[index] for index in chosen):
        examples += item if isinstance(item, list) else [item]
    targets = sum(label != IGNORE_INDEX for example in examples for label in example["labels"][1:])
    return BatchShape(tuple(len(example["input_ids"]) for example in examples), targets)


def _flags(args: RunArguments, processes: int) -> Any:
    """Return transformers' flags with what ``TrainingArguments`` derives, which would start process groups."""
    size = args.trainer_value("per_device_train_batch_size")
    return cast(
        Any, SimpleNamespace(**{**vars(args.trainer_values()), "train_batch_size": size, "world_size": processes})
    )
