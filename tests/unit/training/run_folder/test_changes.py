"""What may differ between a checkpoint and the command that goes on from it, and where a run begins."""

from __future__ import annotations

import logging
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from checkpoints.files import save_json
from errors import ConfigError
from tests.models import TINY
from training.config.args import RunArguments
from training.config.parsing import parse_args
from training.config.trainer_flags import transformers_flags
from training.distributed.world import World
from training.run_folder import changes
from training.run_folder.changes import check_changes, compare, facts_from_args
from training.run_folder.manifest import MANIFEST, write_manifest
from training.run_folder.names import RUN_ARGUMENTS, RUN_SUMMARY
from training.run_folder.start import Start, agree_on_start, check_start, find_start

DATA = {"train": "d1", "eval": "d2"}


def arguments(output: Path, *flags: object) -> RunArguments:
    given = ["--model_name_or_path", TINY, "--data_path", "train.json", "--output_dir", output, *flags]
    return parse_args([str(word) for word in given])


def facts_of(args: RunArguments, **known: Any) -> dict[str, Any]:
    """What finetune.py knows of a run when its data has been read."""
    late = {"embeddings": "none", "base": "b1", "data": DATA, "versions": {"torch": "2.13.0"}}
    return {**facts_from_args(args), **late, **known}


def differences(old: tuple[object, ...], new: tuple[object, ...], **known: Any) -> dict[str, list[str]]:
    """By what comes of it, for two command lines; ``known`` is what the new run knows otherwise."""
    saved, facts = facts_of(arguments(Path("a"), *old)), facts_of(arguments(Path("b"), *new), **known)
    found = compare(facts, saved)
    return {name: lines for name, lines in vars(found).items() if lines}


# ------------------------------------------------------------------------------------------------------ what may differ


def test_the_same_run_elsewhere_is_the_same_run() -> None:
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
def test_other_weights_than_the_checkpoint_has_are_refused(
    old: tuple[object, ...], new: tuple[object, ...], line: str
) -> None:
    assert differences(old, new)["refused"] == [line]


def test_another_model_is_refused_whatever_is_allowed() -> None:
    saved = facts_of(arguments(Path("a")))
    facts = facts_of(arguments(Path("a")), base="b2", embeddings="full")
    for allowed in (False, True):
        with pytest.raises(ConfigError) as caught:
            check_changes(facts, saved, "out/checkpoint-4", allowed)
        assert str(caught.value) == (
            "--resume_from_checkpoint: out/checkpoint-4 is not of this run:\n"
            "  1. trained embeddings: full, not none\n"
            "  2. weights of the base model: others than those that the checkpoint was made with\n"
            "  Another run needs another --output_dir"
        )


def test_what_needs_leave_is_listed_at_once_and_accepted_with_it() -> None:
    saved = facts_of(arguments(Path("a"), "--label_mask", "last"), world_size=2, engine="ddp")
    changed = arguments(
        Path("b"), "--seed", 3, "--per_device_train_batch_size", 2, "--data_mixing", "sequential", "--learning_rate", 1
    )
    facts = facts_of(changed, data={**DATA, "train": "d9"})
    by_leave = [
        "--seed 3, not 42",
        "--data_mixing sequential, not mixed",
        "data to train: other examples than before (--label_mask assistant, not last)",
        "batch: 2 per device x 1 accumulated x 1 processes, not 8 x 1 x 2",
    ]
    with pytest.raises(ConfigError) as caught:
        check_changes(facts, saved, "checkpoint-4", allowed=False)
    *lines, fix = str(caught.value).splitlines()[1:]
    assert [line.partition(". ")[2] for line in lines] == by_leave
    assert fix == "  Give what the checkpoint was made with, or --allow_resume_changes to go on all the same"
    accepted = check_changes(facts, saved, "checkpoint-4", allowed=True)
    assert accepted == [*by_leave, "--learning_rate 1.0, not 5e-05"]


def test_the_rest_is_a_warning() -> None:
    new = ("--learning_rate", "1e-3", "--weight_decay", "0.1", "--max_steps", 9)
    assert differences((), new, data={**DATA, "eval": "d8"}, versions={"torch": "3.0"}) == {
        "warned": [
            "--max_steps 9, not -1",
            "--learning_rate 0.001, not 5e-05",
            "--weight_decay 0.1, not 0.0; the checkpoint's stays in force",
            "data to eval: other examples than before",
            "torch 3.0, not 2.13.0: rounding may differ",
        ]
    }


def test_engines_that_keep_the_optimizer_otherwise_are_refused() -> None:
    assert differences((), (), engine="zero2", world_size=1) == {
        "refused": ["engine: zero2, not none; each keeps the optimizer in its own way"]
    }
    assert "refused" not in differences((), (), engine="ddp", world_size=2)
    saved = facts_of(arguments(Path("a")), engine="zero3", world_size=4)
    found = compare({**saved, "world_size": 2}, saved)
    assert found.by_leave == [] and found.refused[0].endswith("zero3 divides the optimizer among its processes")


def test_a_checkpoint_without_its_optimizer_needs_leave() -> None:
    assert list(differences(("--save_only_model", "True"), ())) == ["by_leave"]


def test_what_is_not_known_is_not_compared() -> None:
    """Before the data is read, or of a checkpoint that says less."""
    args = arguments(Path("a"))
    saved = facts_of(args)
    for facts, other in ((facts_from_args(args), saved), (saved, {}), (saved, {"arguments": {"seed": 42}})):
        assert compare(facts, other) == changes.Differences()


def test_every_name_is_a_flag() -> None:
    """A flag that was renamed would be compared as harmless no more, or not at all."""
    flags = arguments(Path("a")).to_dict()
    ours = {"allow_resume_changes"}  # said once, so not among the values that make the run again
    named = {*changes._PLACES, *changes._OF_DATA, *changes._FIXED, *changes._IN_MODE, *changes._ORDER, *changes._KEPT,
             *changes._BATCH, *changes._HARMLESS}  # fmt: skip
    assert named - set(flags) - ours - set(transformers_flags()) == set()


# ------------------------------------------------------------------------------------------------------ where it begins


def write_run(output: Path, args: RunArguments, *steps: int, is_done: bool = False) -> None:
    """What a run leaves: a record of its arguments, checkpoints, and a summary at its end."""
    output.mkdir(exist_ok=True)
    facts = facts_of(args)
    save_json(facts["arguments"], output / RUN_ARGUMENTS)
    (output / "training_log.jsonl").write_text("")
    for step in steps:
        checkpoint = output / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text("{}")
        write_manifest(checkpoint, step, facts)
    if is_done:
        digests = {name: {"digest": digest} for name, digest in DATA.items()}
        save_json({"steps": 9, "base_fingerprint": "b1", "data": digests}, output / RUN_SUMMARY)


def start_of(output: Path, *flags: object, **known: Any) -> Start:
    args = arguments(output, *flags)
    check_start(args)
    return find_start(args, facts_of(args, **known))


def refused(output: Path, *flags: object, **known: Any) -> str:
    before = sorted(output.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        start_of(output, *flags, **known)
    assert sorted(output.rglob("*")) == before
    return str(caught.value)


AUTO = ("--resume_from_checkpoint", "auto")


def test_auto_starts_where_there_is_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert start_of(output) == Start()
    assert start_of(output, *AUTO).checkpoint is None
    (output / ".saving").mkdir(parents=True)
    assert start_of(output, *AUTO) == Start(removes_leftovers=True)


def test_auto_goes_on_from_the_newest_whole_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(tmp_path, arguments(tmp_path), 2, 4, 6)
    assert start_of(tmp_path, *AUTO) == Start(str(tmp_path / "checkpoint-6"))
    assert start_of(tmp_path, "--resume_from_checkpoint", "True") == Start(str(tmp_path / "checkpoint-6"))
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text("{")
    with caplog.at_level(logging.INFO):
        assert start_of(tmp_path, *AUTO) == Start(str(tmp_path / "checkpoint-4"))
    assert caplog.messages[-1] == (
        f"Going on from {tmp_path / 'checkpoint-4'}: the steps behind it happen again, and checkpoint-6 will be "
        "removed with the first checkpoint that is saved"
    )
    assert "checkpoint-6 is not whole" in caplog.messages[-2]
    assert start_of(tmp_path, *AUTO, "--overwrite_output_dir") == Start()


def test_auto_and_overwriting_start_anew_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that starts the processes again after a failure does not throw away what they had saved."""
    write_run(tmp_path, arguments(tmp_path), 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert start_of(tmp_path, *AUTO, "--overwrite_output_dir").checkpoint == str(tmp_path / "checkpoint-2")


def test_auto_takes_over_what_the_same_run_left_before_its_first_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path, arguments(tmp_path))
    assert start_of(tmp_path, *AUTO) == Start(removes_leftovers=True)
    assert refused(tmp_path, *AUTO, "--learning_rate", 1, "--data_path", "other.json") == (
        "--resume_from_checkpoint auto: --output_dir holds another run:\n"
        "  1. --learning_rate 1.0, not 5e-05\n"
        "  2. --data_path other.json, not train.json\n"
        "  Give another --output_dir, or start anew with --overwrite_output_dir"
    )
    (tmp_path / RUN_ARGUMENTS).unlink()
    assert "it has no run_args.json" in refused(tmp_path, *AUTO)


def test_auto_does_not_throw_away_checkpoints_that_it_cannot_judge(tmp_path: Path) -> None:
    write_run(tmp_path, arguments(tmp_path), 2)
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    assert refused(tmp_path, *AUTO) == (
        f"--resume_from_checkpoint auto: {tmp_path / 'checkpoint-2'} has no manifest.json, so nothing tells whether "
        "it is whole and of this run. Name it to use it all the same: "
        f"--resume_from_checkpoint {tmp_path / 'checkpoint-2'}"
    )


def test_a_run_that_is_done(tmp_path: Path) -> None:
    write_run(tmp_path, arguments(tmp_path, "--max_steps", 9), 9, is_done=True)
    same = (*AUTO, "--max_steps", 9)
    assert start_of(tmp_path, *same, "--logging_steps", 3) == Start(is_finished=True)
    assert "data to train: other examples than those of that run" in refused(tmp_path, *same, data={"train": "d7"})
    assert "weights of the base model" in refused(tmp_path, *same, base="b2")
    assert "--learning_rate 1.0, not 5e-05" in refused(tmp_path, *same, "--learning_rate", 1)
    # More steps are a way to go on.
    assert start_of(tmp_path, *AUTO, "--max_steps", 12) == Start(str(tmp_path / "checkpoint-9"))


def test_a_checkpoint_by_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(tmp_path, arguments(tmp_path), 2, 4)
    named = ("--resume_from_checkpoint", tmp_path / "checkpoint-2")
    assert start_of(tmp_path, *named) == Start(str(tmp_path / "checkpoint-2"))
    assert "--seed 1, not 42" in refused(tmp_path, *named, "--seed", 1)
    assert start_of(tmp_path, *named, "--seed", 1, "--allow_resume_changes").checkpoint is not None
    assert "--seed 1, not 42" in caplog.messages[-2]
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{      }")
    assert refused(tmp_path, *named).startswith(
        f"--resume_from_checkpoint {tmp_path / 'checkpoint-2'}: it is not whole, trainer_state.json has 8 of 2 bytes"
    )
    # One of an earlier version says nothing of itself.
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    assert start_of(tmp_path, *named, "--seed", 1).checkpoint == str(tmp_path / "checkpoint-2")
    assert "has no manifest.json: nothing tells whether it is whole" in caplog.messages[-2]


def test_what_the_command_line_tells_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write_run(tmp_path, arguments(tmp_path), 2)
    with pytest.raises(ConfigError, match="mode: lora, not full"):
        check_start(arguments(tmp_path, *AUTO, "--use_lora"))


def test_only_the_first_process_looks_and_all_do_the_same(tmp_path: Path) -> None:
    """The second one has no facts; each gets the decision, or the error."""
    write_run(tmp_path, arguments(tmp_path), 2)
    first = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    second = TCPStore("127.0.0.1", first.port, is_master=False, timeout=timedelta(seconds=60))
    args = arguments(tmp_path, *AUTO)
    results: dict[int, list[object]] = {0: [], 1: []}

    def process(rank: int, store: TCPStore) -> None:
        world = World(rank, 2, store)
        for seed in (42, 1):
            facts = facts_of(arguments(tmp_path, "--seed", seed), world_size=1)
            try:
                results[rank].append(agree_on_start(world, args, facts if rank == 0 else {}))
            except ConfigError as error:
                results[rank].append(str(error))
        world.final_barrier()

    threads = [threading.Thread(target=process, args=each) for each in ((0, first), (1, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results[0] == results[1] and len(results[0]) == 2
    assert results[0][0] == Start(str(tmp_path / "checkpoint-2"))
    assert "--seed 1, not 42" in str(results[0][1])
