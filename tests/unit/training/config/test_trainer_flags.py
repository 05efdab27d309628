"""Reading transformers' flags from its source."""

from __future__ import annotations

import dataclasses
from enum import Enum

import pytest
from transformers import IntervalStrategy, SchedulerType, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from training.config.trainer_flags import transformers_flags


def test_flags_read_from_source_equal_the_declared_fields() -> None:
    """Name, order, default and help, in the installed version."""
    declared = [item for item in dataclasses.fields(TrainingArguments) if item.init]
    flags = transformers_flags()
    # An object of accelerate that cannot be written as text.
    assert [item.name for item in declared if item.name != "parallelism_config"] == list(flags)
    for item in declared:
        flag = flags.get(item.name)
        if flag is None:
            continue
        default = item.default_factory() if callable(item.default_factory) else item.default
        assert flag.default == (default.value if isinstance(default, Enum) else default), item.name
        assert flag.help == item.metadata.get("help", ""), item.name
        assert flag.kinds, item.name


@pytest.mark.parametrize(
    ("name", "enum"),
    [
        ("lr_scheduler_type", SchedulerType), ("optim", OptimizerNames), ("eval_strategy", IntervalStrategy),
        ("logging_strategy", IntervalStrategy), ("save_strategy", SaveStrategy),
    ],
)  # fmt: skip
def test_choices_equal_the_enums_values(name: str, enum: type[Enum]) -> None:
    assert transformers_flags()[name].choices == tuple(member.value for member in enum)


def test_kinds_follow_the_annotations() -> None:
    flags = transformers_flags()
    kinds = {
        "max_steps": {"int"}, "learning_rate": {"float"}, "bf16": {"bool"}, "run_name": {"str"},
        "eval_steps": {"float"}, "report_to": {"str", "list"}, "lr_scheduler_kwargs": {"dict", "str"},
        "label_names": {"list"}, "include_num_input_tokens_seen": {"str", "bool"}, "optim": {"str"},
    }  # fmt: skip
    assert {name: set(flags[name].kinds) for name in kinds} == kinds
    assert {name: flags[name].optional for name in ("eval_steps", "tf32", "max_steps", "bf16")} == {
        "eval_steps": True, "tf32": True, "max_steps": False, "bf16": False,
    }  # fmt: skip
