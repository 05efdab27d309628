"""One run in an output folder at a time, and nothing in it written through links or over what is not a file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from errors import ConfigError
from ownership import MARK
from tests.commands import names_in
from tests.golden import REPO
from tests.unit.training.run_folder.test_prepare import arguments, leave_mark, refuses, write_run
from training.run_folder.prepare import check_output, find_removable, owned_output, prepare_output


def test_second_run_is_refused_with_the_process_of_the_first(tmp_path: Path) -> None:
    output = write_run(tmp_path / "out", 2)
    code = (
        "import sys, ownership, pathlib\nowned = ownership.OwnedFolder(pathlib.Path(sys.argv[1]), 'x')\n"
        "print(flush=True)\ninput()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(output)], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline()
        before = names_in(output)
        for flags in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "auto"]):
            args = arguments(output, *flags)
            for attempt in (check_output, prepare_output, lambda args: owned_output(args).__enter__()):
                with pytest.raises(
                    ConfigError, match=rf"^--output_dir {output} is in use by \S+ \(process {process.pid} "
                ):
                    attempt(args)
        assert names_in(output) == before
        process.kill()
        process.wait()
        with owned_output(arguments(output, "--overwrite_output_dir")):
            prepare_output(arguments(output, "--overwrite_output_dir"))
            assert names_in(output) == [MARK]


def test_folder_is_free_after_the_run_and_removed_if_nothing_was_written(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    args = arguments(output)
    with owned_output(args):
        check_output(args)
        with pytest.raises(ConfigError, match="is in use by"):
            owned_output(args).__enter__()
    assert names_in(tmp_path) == []
    with pytest.raises(RuntimeError), owned_output(args):
        (output / "training_log.jsonl").touch()
        raise RuntimeError
    assert names_in(output) == ["training_log.jsonl"]


def test_only_rank_0_owns_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path / "out")
    with owned_output(args):
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with owned_output(args):
            assert names_in(tmp_path / "out") == [MARK]
        assert names_in(tmp_path / "out") == [MARK]
        monkeypatch.delenv("RANK")


def test_folder_of_a_run_that_was_killed_before_it_wrote_anything_is_empty(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    leave_mark(tmp_path / "out")
    for flags in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "auto"]):
        prepare_output(arguments(tmp_path / "out", *flags))
    assert find_removable(tmp_path / "out") == []


@pytest.mark.parametrize("name", [".saving", ".run_args.json.partial"])
def test_hidden_folders_of_users_are_never_removed(tmp_path: Path, name: str) -> None:
    output = write_run(tmp_path / "out", 2)
    (output / name).mkdir()
    (output / name / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=rf"{name} has no mark of this toolkit|contains {name}, which finetune.py"):
        prepare_output(arguments(output, "--overwrite_output_dir"))
    if name == ".saving":  # nothing could be saved
        refuses(
            arguments(output, "--resume_from_checkpoint", "True"),
            f"{output / name} has no mark of this toolkit and may be yours. Move it away",
        )
    assert (output / name / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "make", "kind"),
    [
        ("training_log.jsonl", lambda path: path.symlink_to("/etc/hostname"), "a symbolic link"),
        ("run_args.json", os.mkfifo, "a named pipe"),
        ("model.safetensors", os.mkdir, "a folder"),
        ("runs", lambda path: path.symlink_to(path.parent.parent), "a symbolic link"),
    ],
)
def test_links_and_devices_under_names_of_a_run_are_refused(
    tmp_path: Path, name: str, make: Callable[[Path], object], kind: str
) -> None:
    output = write_run(tmp_path / "out", 2)
    (output / name).unlink(missing_ok=True)
    make(output / name)
    for flags in (["--overwrite_output_dir"], ["--resume_from_checkpoint", "True"]):
        refuses(arguments(output, *flags), f"--output_dir {output}: {name} is {kind}. Move it away")


def test_data_in_the_place_of_a_file_of_the_run_is_refused(tmp_path: Path) -> None:
    output = write_run(tmp_path / "out", 2)
    flags = ["--data_path", output / "training_log.jsonl", "--resume_from_checkpoint", "True"]
    what = f"--data_path {output / 'training_log.jsonl'} is inside --output_dir {output}"
    refuses(arguments(output, *flags), f"{what}. Move the data away")


def test_logging_dir_is_a_folder_outside_of_the_inputs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    output = tmp_path / "out"
    refuses(
        arguments(output, "--logging_dir", tmp_path / "file"),
        f"--logging_dir {tmp_path / 'file'} is a file. Give a folder",
    )
