"""Settings that may differ between a checkpoint and the command that resumes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from errors import ConfigError
from tests.models import TINY
from training.config.args import RunArguments
from training.config.parsing import parse_args
from training.config.trainer_flags import transformers_flags
from training.run_folder import changes
from training.run_folder.changes import check_changes, compare, facts_from_args

DATA = {"train": "d1", "eval": "d2"}


def arguments(output: Path, *flags: object) -> RunArguments:
    argv = ["--model_name_or_path", TINY, "--data_path", "train.json", "--output_dir", output, *flags]
    return parse_args([str(word) for word in argv])


def facts_of(args: RunArguments, **known: Any) -> dict[str, Any]:
    """Return the facts of a run whose data has been read."""
    late = {"embeddings": "none", "base": "b1", "data": DATA, "versions": {"torch": "2.13.0"}}
    return {**facts_from_args(args), **late, **known}


def differences(old: tuple[object, ...], new: tuple[object, ...], **known: Any) -> dict[str, list[str]]:
    """Return the differences between two command lines by consequence; ``known`` are other facts of the new run."""
    saved, facts = facts_of(arguments(Path("a"), *old)), facts_of(arguments(Path("b"), *new), **known)
    return {name: lines for name, lines in vars(compare(facts, saved)).items() if lines}


# --------------------------------------------------------------------------------------------------- compared facts


def test_paths_logging_and_saving_make_no_difference() -> None:
    old = ("--use_lora", "--lora_target_modules", "c_attn", "w1")
    new = (
        "--use_lora", "--lora_target_modules", "w1", "c_attn", "--logging_steps", 1, "--save_steps", 7,
        "--eval_steps", 3, "--report_to", "none", "--save_total_limit", 2, "--dataloader_num_workers", 2,
        "--disable_tqdm", "True", "--per_device_eval_batch_size", 2, "--model_name_or_path", TINY.parent / TINY.name,
        "--logging_dir", "x",
    )  # fmt: skip
    assert differences(old, new) == {}


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ((), ("--use_lora",), "mode: lora, not full"),
        (("--use_lora",), ("--use_lora", "--lora_r", 8), "--lora_r 8, not 64"),
        (
            ("--use_lora", "--lora_target_modules", "c_attn"),
            ("--use_lora",),
            "--lora_target_modules (not given), not c_attn",
        ),
        ((), ("--optim", "adafactor"), "--optim adafactor, not adamw_torch_fused"),
        ((), ("--pure_bf16",), "--pure_bf16 True, not False"),
    ],
)
def test_changes_of_the_trained_parameters_are_refused(
    old: tuple[object, ...], new: tuple[object, ...], line: str
) -> None:
    assert differences(old, new)["refused"] == [line]


def test_another_model_is_refused_even_if_changes_are_allowed() -> None:
    saved = facts_of(arguments(Path("a")))
    facts = facts_of(arguments(Path("a")), base="b2", embeddings="full")
    for allowed in (False, True):
        with pytest.raises(ConfigError) as caught:
            check_changes(facts, saved, "out/checkpoint-4", allowed)
        assert str(caught.value) == (
            "--resume_from_checkpoint: out/checkpoint-4 does not belong to this run:\n"
            "  1. trained embeddings: full, not none\n"
            "  2. base model: its weights differ from those that the checkpoint was trained from\n"
            "  Another run needs another --output_dir"
        )


def test_changes_that_need_permission_are_listed_together_and_accepted_with_it() -> None:
    saved = facts_of(arguments(Path("a"), "--label_mask", "last"), world_size=2, engine="ddp")
    changed = arguments(
        Path("b"), "--seed", 3, "--per_device_train_batch_size", 2, "--data_mixing", "sequential", "--learning_rate", 1
    )
    facts = facts_of(changed, data={**DATA, "train": "d9"})
    needs_permission = [
        "--seed 3, not 42",
        "--data_mixing sequential, not mixed",
        "training data: the examples differ (--label_mask assistant, not last)",
        "batch: 2 per device x 16 accumulated x 1 processes, not 1 x 16 x 2",
    ]
    with pytest.raises(ConfigError) as caught:
        check_changes(facts, saved, "checkpoint-4", allowed=False)
    *lines, fix = str(caught.value).splitlines()[1:]
    assert [line.partition(". ")[2] for line in lines] == needs_permission
    assert fix == "  Restore these settings, or add --allow_resume_changes to resume with the changes"
    accepted = check_changes(facts, saved, "checkpoint-4", allowed=True)
    assert accepted == [*needs_permission, "--learning_rate 1.0, not 1e-05"]


def test_inputs_that_are_not_read_yet_are_named_beside_a_refused_flag() -> None:
    saved = facts_of(arguments(Path("a"), "--use_lora"))
    facts = facts_from_args(arguments(Path("a"), "--use_lora", "--lora_r", 4, "--data_path", "b.json"))
    with pytest.raises(ConfigError) as caught:
        check_changes(facts, saved, "checkpoint-4", allowed=False)
    assert [line.partition(". ")[2] for line in str(caught.value).splitlines()[1:-1]] == [
        "--lora_r 4, not 64",
        "--data_path b.json, not train.json (its content has not been compared yet)",
    ]
    moved = facts_from_args(arguments(Path("a"), "--use_lora", "--data_path", "b.json"))
    assert check_changes(moved, saved, "checkpoint-4", allowed=False) == []


def test_other_packs_need_permission() -> None:
    """Packs depend on the maximum length, even if no sample does; the flag alone does not say whether there are any."""
    saved = facts_of(arguments(Path("a"), "--packing"), packs=2048)
    same = compare(facts_of(arguments(Path("a")), packs=2048), saved)
    longer = compare(facts_of(arguments(Path("a"), "--packing", "--model_max_length", 64), packs=64), saved)
    none = compare(facts_of(arguments(Path("a"), "--packing", "false"), packs=0), saved)
    assert same == changes.Differences()
    assert longer.needs_permission == ["training samples: packs of 64 tokens, not packs of 2048 tokens"]
    assert none.needs_permission == ["training samples: no packing, not packs of 2048 tokens"]


def test_other_changes_are_warnings() -> None:
    new = ("--learning_rate", "1e-3", "--weight_decay", "0.2", "--max_steps", 9)
    assert differences((), new, data={**DATA, "eval": "d8"}, versions={"torch": "3.0"}) == {
        "warned": [
            "--max_steps 9, not -1",
            "--learning_rate 0.001, not 1e-05",
            "--weight_decay 0.2, not 0.1; the checkpoint's value stays in effect",
            "evaluation data: the examples differ",
            "torch 3.0, not 2.13.0: rounding may differ",
        ]
    }


def test_engines_with_incompatible_optimizer_states_are_refused() -> None:
    assert differences((), (), engine="zero2", world_size=1) == {
        "refused": ["engine: zero2, not none; their optimizer states are not compatible"]
    }
    assert "refused" not in differences((), (), engine="ddp", world_size=2)
    saved = facts_of(arguments(Path("a")), engine="zero3", world_size=4)
    result = compare({**saved, "world_size": 2}, saved)
    assert result.needs_permission == [] and result.refused[0].endswith("zero3 shards the optimizer state by process")


def test_a_checkpoint_without_optimizer_needs_permission() -> None:
    assert list(differences(("--save_only_model", "True"), ())) == ["needs_permission"]


def test_unknown_facts_are_not_compared() -> None:
    """Before the data is read, or for a checkpoint of an earlier version."""
    args = arguments(Path("a"))
    saved = facts_of(args)
    for facts, other in ((facts_from_args(args), saved), (saved, {}), (saved, {"arguments": {"seed": 42}})):
        assert compare(facts, other) == changes.Differences()


def test_every_listed_name_is_a_flag() -> None:
    """A renamed flag would silently leave its group."""
    flags = arguments(Path("a")).to_dict()
    not_recorded = {"allow_resume_changes"}
    named = {
        *changes._INPUT_PATHS, *changes._ENCODING, *changes._PARAMETERS, *changes._MODE, *changes._ORDER,
        *changes._OPTIMIZER_STATE, *changes._BATCH, *changes._HARMLESS,
    }  # fmt: skip
    assert named - set(flags) - not_recorded - set(transformers_flags()) == set()
