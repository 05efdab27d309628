"""The start of a run: from the base model, from a checkpoint, or none."""

from __future__ import annotations

import json
import logging
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

import training.run_folder.manifest as manifest_module
from checkpoints.files import save_json
from checkpoints.names import RUN_ARGUMENTS, RUN_SUMMARY
from errors import ConfigError
from tests.folder_faults import CONTENTS, FAULTS, spoil
from tests.unit.training.run_folder.test_changes import DATA, arguments, facts_of
from training.config.args import RunArguments
from training.distributed.world import World
from training.run_folder.manifest import write_manifest
from training.run_folder.names import MANIFEST
from training.run_folder.start import Start, agree_on_start, check_start, find_start


def write_run(output: Path, args: RunArguments, *steps: int, is_finished: bool = False) -> None:
    """Write the folder of a run: its arguments, checkpoints, and the summary of a finished one."""
    output.mkdir(exist_ok=True)
    facts = facts_of(args)
    save_json(facts["arguments"], output / RUN_ARGUMENTS)
    (output / "training_log.jsonl").write_text("")
    for step in steps:
        checkpoint = output / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text("{}")
        write_manifest(checkpoint, step, facts)
    if is_finished:
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


def test_auto_starts_in_an_empty_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert start_of(output) == Start()
    assert start_of(output, *AUTO).checkpoint is None
    (output / ".saving").mkdir(parents=True)
    assert start_of(output, *AUTO) == Start(removes_leftovers=True)


def test_auto_resumes_from_the_newest_intact_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(tmp_path, arguments(tmp_path), 2, 4, 6)
    assert start_of(tmp_path, *AUTO) == Start(str(tmp_path / "checkpoint-6"))
    assert start_of(tmp_path, "--resume_from_checkpoint", "True") == Start(str(tmp_path / "checkpoint-6"))
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text("{")
    with caplog.at_level(logging.INFO):
        assert start_of(tmp_path, *AUTO) == Start(str(tmp_path / "checkpoint-4"))
    assert caplog.messages[-1] == (
        f"Resuming from {tmp_path / 'checkpoint-4'}: later steps are repeated, and checkpoint-6 will be removed when "
        "the next checkpoint is saved"
    )
    assert "checkpoint-6 is incomplete or damaged" in caplog.messages[-2]
    assert start_of(tmp_path, *AUTO, "--overwrite_output_dir") == Start()


def test_overwriting_with_auto_starts_over_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a launcher restarts after a failure keep their checkpoints."""
    write_run(tmp_path, arguments(tmp_path), 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert start_of(tmp_path, *AUTO, "--overwrite_output_dir").checkpoint == str(tmp_path / "checkpoint-2")


def test_auto_removes_what_the_same_run_left_before_its_first_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path, arguments(tmp_path))
    assert start_of(tmp_path, *AUTO) == Start(removes_leftovers=True)
    assert refused(tmp_path, *AUTO, "--learning_rate", 1, "--data_path", "other.json") == (
        "--resume_from_checkpoint auto: --output_dir contains another run:\n"
        "  1. --learning_rate 1.0, not 1e-05\n"
        "  2. --data_path other.json, not train.json\n"
        "  Give another --output_dir, or start over with --overwrite_output_dir"
    )
    (tmp_path / RUN_ARGUMENTS).unlink()
    assert "it has no run_args.json" in refused(tmp_path, *AUTO)


def test_auto_refuses_checkpoints_without_a_manifest(tmp_path: Path) -> None:
    write_run(tmp_path, arguments(tmp_path), 2)
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    assert refused(tmp_path, *AUTO) == (
        f"--resume_from_checkpoint auto: {tmp_path / 'checkpoint-2'} has no manifest.json to check that it is "
        "intact and belongs to this run. To use it unchecked, name it: "
        f"--resume_from_checkpoint {tmp_path / 'checkpoint-2'}"
    )


def test_a_finished_run_is_done_unless_the_command_asks_for_more(tmp_path: Path) -> None:
    write_run(tmp_path, arguments(tmp_path, "--max_steps", 9), 9, is_finished=True)
    same = (*AUTO, "--max_steps", 9)
    assert start_of(tmp_path, *same, "--logging_steps", 3) == Start(is_finished=True)
    assert "training data: the examples differ" in refused(tmp_path, *same, data={"train": "d7"})
    assert "base model: its weights differ" in refused(tmp_path, *same, base="b2")
    assert "--learning_rate 1.0, not 1e-05" in refused(tmp_path, *same, "--learning_rate", 1)
    # More steps continue it.
    assert start_of(tmp_path, *AUTO, "--max_steps", 12) == Start(str(tmp_path / "checkpoint-9"))


def test_a_named_checkpoint_is_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(tmp_path, arguments(tmp_path), 2, 4)
    named = ("--resume_from_checkpoint", tmp_path / "checkpoint-2")
    assert start_of(tmp_path, *named) == Start(str(tmp_path / "checkpoint-2"))
    assert "--seed 1, not 42" in refused(tmp_path, *named, "--seed", 1)
    assert start_of(tmp_path, *named, "--seed", 1, "--allow_resume_changes").checkpoint is not None
    assert "--seed 1, not 42" in caplog.messages[-2]
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{      }")
    assert refused(tmp_path, *named).startswith(
        f"--resume_from_checkpoint {tmp_path / 'checkpoint-2'}: incomplete or damaged, "
        "trainer_state.json has 8 of 2 bytes. "
    )
    # Checkpoints of an earlier version have no manifest.
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    assert start_of(tmp_path, *named, "--seed", 1).checkpoint == str(tmp_path / "checkpoint-2")
    assert "has no manifest.json to check that it is intact" in caplog.messages[-2]


def test_differing_flags_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    write_run(tmp_path, arguments(tmp_path), 2)
    with pytest.raises(ConfigError, match="mode: lora, not full"):
        check_start(arguments(tmp_path, *AUTO, "--use_lora"))


def test_rank_0_decides_for_all_ranks(tmp_path: Path) -> None:
    """The other rank has no facts; both get the decision, or the error."""
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


@pytest.mark.parametrize("fault", [*FAULTS])
@pytest.mark.parametrize("file", ["trainer_state.json", MANIFEST, RUN_ARGUMENTS, RUN_SUMMARY, "config.json"])
def test_faulty_file_of_a_run(tmp_path: Path, file: str, fault: str) -> None:
    """Resuming ends in one line; ``auto`` uses an earlier checkpoint, or starts over, only if none is damaged."""
    write_run(tmp_path, arguments(tmp_path), 2, is_finished=file == RUN_SUMMARY)
    checkpoint = tmp_path / "checkpoint-2"
    is_record = file in (RUN_ARGUMENTS, RUN_SUMMARY)
    spoil((tmp_path if is_record else checkpoint) / file, fault)
    if is_record and fault in ("NaN", "infinite"):
        return  # a run that diverged records these
    if file in ("trainer_state.json", "config.json") and fault in CONTENTS:
        (checkpoint / MANIFEST).unlink()  # its checksum is right
        write_manifest(checkpoint, 2, facts_of(arguments(tmp_path)))
    if file == "trainer_state.json" and fault in ("NaN", "infinite"):
        return
    if is_record:
        assert file in refused(tmp_path, *AUTO)
        return
    with suppress(ConfigError):  # or it starts over
        start_of(tmp_path, *AUTO)
    if file != "config.json" or fault in CONTENTS:  # which is in no manifest otherwise
        assert file in refused(tmp_path, "--resume_from_checkpoint", checkpoint)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("trainer_state.json", "global_step", "2"),
        ("trainer_state.json", "global_step", -1),
        ("trainer_state.json", "epoch", None),
        ("trainer_state.json", "max_steps", 1e308),
        ("trainer_state.json", "log_history", {"loss": 1}),
        ("trainer_state.json", "best_model_checkpoint", ["a"]),
        ("trainer_state.json", "stateful_callbacks", {"TrainerControl": 3}),
        ("trainer_state.json", "stateful_callbacks", {"TrainerControl": {"args": [], "attributes": {}}}),
        ("trainer_state.json", "an_unknown_key", 1),
        (MANIFEST, "format", "1"),
        (MANIFEST, "files", ["trainer_state.json"]),
        (MANIFEST, "files", {"../x": {"size": 1, "sha256": "0" * 64}}),
        (MANIFEST, "files", {"/etc/x": {"size": 1, "sha256": "0" * 64}}),
        (MANIFEST, "files", {"x": {"size": "1", "sha256": "0" * 64}}),
        (MANIFEST, "data", [1]),
        (MANIFEST, "data", {"train": 1}),
        (MANIFEST, "world_size", "2"),
        (MANIFEST, "engine", {"a": 1}),
        (MANIFEST, "mode", "other"),
        (MANIFEST, "arguments", [1]),
        (MANIFEST, "arguments", {"num_train_epochs": "x"}),
        (MANIFEST, "arguments", {"lora_target_modules": [1, "a"]}),
        (MANIFEST, "versions", {"torch": 2}),
    ],
)
def test_value_of_a_checkpoint_with_right_checksums(tmp_path: Path, file: str, key: str, value: Any) -> None:
    write_run(tmp_path, arguments(tmp_path), 2)
    checkpoint = tmp_path / "checkpoint-2"
    if file == MANIFEST:
        content = {key_: value_ for key_, value_ in json.loads((checkpoint / MANIFEST).read_text()).items()}
        content = {name: each for name, each in content.items() if name != "checksum"} | {key: value}
        save_json({**content, "checksum": manifest_module._checksum(content)}, checkpoint / MANIFEST)
    else:
        (checkpoint / MANIFEST).unlink()
        (checkpoint / file).write_text(json.dumps({key: value}))
        write_manifest(checkpoint, 2, facts_of(arguments(tmp_path)))
    message = refused(tmp_path, "--resume_from_checkpoint", checkpoint)
    assert "\n" not in message and file in message
    assert key in message or file == MANIFEST


@pytest.mark.parametrize("value", ["x" * 300, "~nobody-of-this-name/x", "a/../b"])
def test_name_that_is_no_checkpoint(tmp_path: Path, value: str) -> None:
    assert "there is no checkpoint" in refused(tmp_path, "--resume_from_checkpoint", value)
