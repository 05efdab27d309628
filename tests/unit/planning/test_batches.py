"""The micro-batch that is rehearsed is the largest that the run's own sampler forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errors import ConfigError
from planning.batches import RunBatches, assumed_batch, assumed_evaluation
from tests.models import TINY, copy_checkpoint, write_conversations
from training.config.args import RunArguments
from training.config.parsing import parse_args

LENGTHS = (3, 5, 2, 9, 4, 4, 7)


def arguments(*words: object) -> RunArguments:
    flags = ["--model_name_or_path", str(TINY), "--model_max_length", "64", "--plan", "--no_data_cache"]
    return parse_args([*flags, *map(str, words)])


class Items(list[dict[str, Any]]):
    """Examples of which the first two tokens are no targets."""

    lengths = list(LENGTHS)


def examples() -> Items:
    return Items({"input_ids": [0] * length, "labels": [-100] * 2 + [1] * (length - 2)} for length in LENGTHS)


def longest(is_padded: bool, *words: object) -> tuple[int, ...]:
    args = arguments("--train_sampling_strategy", "sequential", "--gradient_accumulation_steps", 1, *words)
    return RunBatches(examples(), is_padded).longest(args, 1).lengths


def test_rows_without_padding_are_compared_by_the_tokens_of_all_samples() -> None:
    assert longest(False, "--per_device_train_batch_size", 2) == (2, 9)
    assert longest(False, "--per_device_train_batch_size", 3) == (9, 4, 4)


def test_padded_rows_are_compared_by_their_positions() -> None:
    """4 x 9 positions for the first four samples, 3 x 7 for the last three."""
    assert longest(True, "--per_device_train_batch_size", 4) == (3, 5, 2, 9)


def test_micro_batches_are_joined_as_in_the_run() -> None:
    """Two steps of two micro-batches of two samples, of which the longest two have 16 tokens: 8 and 11; 8 + 7."""
    flags = ("--train_sampling_strategy", "sequential", "--per_device_train_batch_size", 2)
    flags = (*flags, "--gradient_accumulation_steps", 2)
    batches = RunBatches(examples(), False)
    shape = batches.longest(arguments(*flags), 1)
    assert shape.lengths == (4, 4, 7) and shape.per_step == 1.5
    for flag in (("--join_micro_batches", "False"), ("--deepspeed", "finetune/ds_config_zero2.json")):
        apart = batches.longest(arguments(*flags, *flag), 1)
        assert apart.lengths == (2, 9) and apart.per_step == 2


def test_targets_are_counted_without_the_first_token_of_a_sample() -> None:
    args = arguments("--train_sampling_strategy", "sequential", "--per_device_train_batch_size", 2)
    args = replace(args, options=replace(args.options, join_micro_batches=False))
    assert RunBatches(examples(), False).longest(args, 1).targets == 0 + 7


def test_every_epoch_is_searched_because_shuffling_forms_other_batches() -> None:
    """In one epoch the two longest samples rarely meet; in twenty they do with this seed."""
    batches = RunBatches(examples(), False)
    few, many = (
        sum(batches.longest(arguments("--num_train_epochs", epochs, "--per_device_train_batch_size", 2), 1).lengths)
        for epochs in (1, 20)
    )
    assert few < many == 9 + 7


def test_without_data_rows_have_the_maximum_length_and_every_token_is_a_target() -> None:
    shape = assumed_batch(arguments("--per_device_train_batch_size", 3))
    assert shape.lengths == (64, 64, 64) and shape.targets == 3 * 63


def test_evaluations_take_the_longest_examples_of_their_own_set() -> None:
    """Nothing for a run that never evaluates, although it has such data."""
    words = ("--per_device_eval_batch_size", 2, "--eval_strategy", "steps")
    batches = RunBatches(examples(), False, evaluated=examples())
    shape = batches.longest_evaluation(arguments(*words))
    assert shape is not None and sorted(shape.lengths) == [7, 9] and shape.targets == 5 + 7
    assert batches.longest_evaluation(arguments()) is None and assumed_evaluation(arguments()) is None
    assumed = assumed_evaluation(arguments(*words))
    assert assumed is not None and assumed.lengths == (64, 64)


@pytest.mark.parametrize("packing", ["False", "True"])
def test_real_data_gives_a_batch_that_the_run_would_train(tmp_path: Path, packing: str) -> None:
    model, data = copy_checkpoint(tmp_path / "model"), write_conversations(tmp_path / "data.json")
    (model / "model.safetensors").unlink()  # a plan needs none
    args = arguments("--model_name_or_path", model, "--data_path", data, "--packing", packing, "--use_lora")
    batches = RunBatches.of_run(args, 1)
    shape = batches.longest(args, 1)
    assert sum(shape.lengths) <= 64 * args.trainer_value("per_device_train_batch_size")
    assert 0 < shape.targets < sum(shape.lengths)
    if packing == "True":
        assert sum(batches.items.lengths) == sum(batches.items.examples.lengths)


@pytest.mark.parametrize("flag", ["per_device_train_batch_size", "per_device_eval_batch_size"])
def test_more_tokens_than_any_device_holds_are_refused(flag: str) -> None:
    args = arguments(f"--{flag}", 10**9, "--eval_on_start")
    message = rf"^--{flag} 1000000000 x --model_max_length 64 are 64,000,000,000 tokens, too many to be rehearsed"
    with pytest.raises(ConfigError, match=message):
        assumed_batch(args)
        assumed_evaluation(args)
