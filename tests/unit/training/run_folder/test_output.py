"""Where a run may write, what it removes, and that what it writes is there whole or not at all."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from errors import ConfigError, RunError, Terminated
from tests.commands import limited_file_size, names_in
from tests.models import TINY, copy_checkpoint, write_conversations
from training.config.args import RunArguments
from training.config.parsing import parse_args
from training.run_folder.manifest import newest_checkpoint
from training.run_folder.output import check_output, explain_how_to_resume, prepare_output
from training.run_folder.staging import saving_errors, staged_checkpoint, staged_files


def arguments(output: Path, *flags: object, model: Path = TINY) -> RunArguments:
    given = ["--model_name_or_path", model, "--data_path", output.parent / "train.json", "--output_dir", output, *flags]
    return parse_args([str(word) for word in given])


def refuses(args: RunArguments, message: str) -> None:
    """In one line, and nothing is touched."""
    root = args.output_dir.parent
    before = sorted(root.rglob("*"))
    for check in (check_output, prepare_output):
        with pytest.raises(ConfigError) as caught:
            check(args)
        assert str(caught.value) == message
    assert sorted(root.rglob("*")) == before


def write_run(folder: Path, *steps: int) -> Path:
    """The folder of an earlier run."""
    for name in ("training_log.jsonl", "run_summary.json", "model.safetensors", "config.json", "qwen.tiktoken"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    return folder


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_new_or_empty_folder_is_good_and_stays_so(tmp_path: Path) -> None:
    prepare_output(arguments(tmp_path / "a" / "b" / "out"))
    assert names_in(tmp_path) == []
    (tmp_path / "out").mkdir()
    for flags in ([], ["--overwrite_output_dir"]):
        prepare_output(arguments(tmp_path / "out", *flags))
    assert names_in(tmp_path / "out") == []


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refuses(arguments(tmp_path / "out"), f"--output_dir {tmp_path / 'out'} is a file. Give a folder")
    inside = tmp_path / "out" / "x"
    refuses(arguments(inside), f"--output_dir {inside}: {tmp_path / 'out'} is a file. Give a folder")


def test_a_folder_of_somebody_elses_files(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    refuses(arguments(output), f"--output_dir {output} is not empty. Give a new folder")


def test_a_folder_of_an_earlier_run(tmp_path: Path) -> None:
    output = write_run(tmp_path / "out")
    anew = "start anew with --overwrite_output_dir, which removes what that run left"
    refuses(arguments(output), f"--output_dir {output} is not empty. Give a new folder, or {anew}")
    write_run(output, 2, 10)
    resume = f"go on with --resume_from_checkpoint {output / 'checkpoint-10'}"
    refuses(arguments(output), f"--output_dir {output} is not empty. Give a new folder, or {resume}, or {anew}")


def test_a_folder_whose_checkpoint_is_resumed(tmp_path: Path) -> None:
    output = write_run(tmp_path / "out", 2)
    before = names_in(output)
    for value in ("True", output / "checkpoint-2"):
        prepare_output(arguments(output, "--resume_from_checkpoint", value))
    assert names_in(output) == [name for name in before if name != "run_summary.json"]  # it is not done any more
    other = write_run(tmp_path / "other", 2)
    with pytest.raises(ConfigError, match=f"^--output_dir {output} is not empty"):
        check_output(arguments(output, "--resume_from_checkpoint", other / "checkpoint-2"))
    prepare_output(arguments(tmp_path / "new", "--resume_from_checkpoint", other / "checkpoint-2"))


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--lora_weight_path"])
def test_a_folder_that_is_inside_of_or_around_an_input(tmp_path: Path, flag: str) -> None:
    model = copy_checkpoint(tmp_path / "models" / "tiny")
    (model / "run_summary.json").write_text("{}")  # as if finetune.py had made it
    named = "the model's own folder" if flag == "--model_name_or_path" else "the folder of --lora_weight_path"
    flags = [flag, model, "--use_lora", "--overwrite_output_dir"]
    (tmp_path / "link").symlink_to(model)
    for output in (model, tmp_path / "models" / ".." / "models" / "tiny", tmp_path / "link"):
        refuses(arguments(output, *flags), f"--output_dir {output} is {named}. Give another folder")
    for output, side in ((model / "out", "inside of"), (tmp_path / "models", "around"), (tmp_path, "around")):
        what = f"--output_dir {output} lies {side} {flag} {model}"
        refuses(arguments(output, *flags), f"{what}. Give a folder that stands apart")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """/proc says that root may write there, and takes no file; for others a folder without the right will do."""
    if os.geteuid() == 0:
        parent, reason = Path("/proc/sys"), None
    else:
        parent, reason = tmp_path / "closed", "permission denied"
        parent.mkdir(mode=0o555)
    with pytest.raises(ConfigError) as caught:
        check_output(arguments(parent / "out"))
    message = str(caught.value)
    assert message.startswith(f"--output_dir {parent / 'out'}: {parent} is not writable ({reason or ''}")
    assert message.endswith("). Choose a folder you may write to")


# ----------------------------------------------------------------------------------------------- --overwrite_output_dir


def test_overwriting_removes_what_a_run_left(tmp_path: Path) -> None:
    output = write_run(tmp_path / "out", 2, 4)
    for name in ("adapter_model.safetensors", "model-00001-of-00002.safetensors", "run_args.json", ".x.json.partial"):
        (output / name).write_text("")
    for name in ("runs/Nov21_host", "profile", ".saving/checkpoint-6"):
        (output / name).mkdir(parents=True)
    (output / "runs" / "Nov21_host" / "events.out.tfevents.1.host.2.0").write_text("")
    (output / "profile" / "trace.json").write_text("")
    (output / "profile" / "operators.txt").write_text("")
    prepare_output(arguments(output, "--overwrite_output_dir"))
    assert names_in(output) == []


def unknown_checkpoint(output: Path) -> None:
    (output / "checkpoint-7").mkdir()
    (output / "checkpoint-7" / "model.safetensors").write_text("")


def notes_beside_events(output: Path) -> None:
    (output / "runs").mkdir()
    (output / "runs" / "notes.txt").write_text("")


def linked_checkpoint(output: Path) -> None:
    write_run(output.parent / "elsewhere", 9)
    (output / "checkpoint-9").symlink_to(output.parent / "elsewhere" / "checkpoint-9")


@pytest.mark.parametrize(
    ("adds", "name"),
    [
        (lambda output: (output / "thesis.tex").write_text("years"), "thesis.tex"),
        (lambda output: (output / "data").mkdir(), "data"),
        (unknown_checkpoint, "checkpoint-7"),
        (notes_beside_events, "runs"),
        (linked_checkpoint, "checkpoint-9"),
    ],
)
def test_overwriting_removes_nothing_where_others_have_files(
    tmp_path: Path, adds: Callable[[Path], object], name: str
) -> None:
    output = write_run(tmp_path / "out", 2)
    adds(output)
    refuses(
        arguments(output, "--overwrite_output_dir"),
        f"--overwrite_output_dir: {output} holds {name}, which no run of finetune.py wrote. "
        "Move it away, or give another --output_dir",
    )


def test_overwriting_does_not_remove_a_model_that_no_run_made(tmp_path: Path) -> None:
    """All of its files have names that a run writes as well."""
    output = copy_checkpoint(tmp_path / "downloaded")
    refuses(
        arguments(output, "--overwrite_output_dir"),
        f"--overwrite_output_dir: {output} is not the folder of a run, it has no training_log.jsonl. "
        "Give another --output_dir, or remove its files yourself",
    )


def test_overwriting_does_not_remove_what_the_run_needs(tmp_path: Path) -> None:
    output = write_run(tmp_path / "out", 2)
    data = write_conversations(output / "config.json")
    refuses(
        arguments(output, "--overwrite_output_dir", "--data_path", data),
        f"--overwrite_output_dir: --data_path {data} lies in --output_dir {output}. Move the data away",
    )
    resumed = output / "checkpoint-2"
    refuses(
        arguments(output, "--overwrite_output_dir", "--resume_from_checkpoint", resumed),
        f"--overwrite_output_dir would remove the checkpoint of --resume_from_checkpoint {resumed}. "
        "Leave one of them out",
    )


def test_only_the_first_process_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write_run(tmp_path / "out", 2)
    before = names_in(output)
    monkeypatch.setenv("RANK", "1")
    prepare_output(arguments(output, "--overwrite_output_dir"))
    assert names_in(output) == before


# -------------------------------------------------------------------------------------------------------- interruptions


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    assert newest_checkpoint(tmp_path) is None
    write_run(tmp_path / "out", 8, 10, 9)
    (tmp_path / "out" / "checkpoint-11").mkdir()
    assert newest_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-10"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Terminated(), RunError("step 3: it broke")])
def test_what_ends_a_run_says_how_it_goes_on(tmp_path: Path, error: BaseException) -> None:
    before = f"{error}. " if isinstance(error, RunError) else ""
    for steps, how in (
        ([], "No checkpoint had been saved: the same command with --overwrite_output_dir starts anew"),
        ([4], f"The same command with --resume_from_checkpoint {tmp_path / 'checkpoint-4'} goes on from there"),
    ):
        write_run(tmp_path, *steps)
        with pytest.raises(type(error)) as caught, explain_how_to_resume(tmp_path):
            raise error
        assert str(caught.value) == before + how


# --------------------------------------------------------------------------------------------------------------- saving


def fill(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("model.safetensors", "trainer_state.json"):
        (folder / name).write_text(text)


def test_a_checkpoint_appears_when_it_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-2"
    for text in ("first", "second"):
        with staged_checkpoint(final) as staged:
            assert staged.name == "checkpoint-2"
            fill(staged, text)
            assert not final.exists() or (final / "model.safetensors").read_text() == "first"
        assert {path.read_text() for path in final.iterdir()} == {text}
        assert names_in(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), Terminated()])
def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tmp_path: Path, error: BaseException) -> None:
    for step in (2, 4):
        with staged_checkpoint(tmp_path / f"checkpoint-{step}") as staged:
            fill(staged, "whole")
    for step in (4, 6):
        with pytest.raises(type(error)), staged_checkpoint(tmp_path / f"checkpoint-{step}") as staged:
            fill(staged, "half")
            raise error
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert {path.read_text() for path in tmp_path.rglob("*.*") if path.is_file()} == {"whole"}


def test_a_process_that_only_takes_part_moves_nothing(tmp_path: Path) -> None:
    with staged_checkpoint(tmp_path / "checkpoint-2", is_writer=False) as staged:
        staged.mkdir(parents=True)
    assert staged.is_dir()
    assert names_in(tmp_path) == [".saving"]


def test_files_take_their_places_together(tmp_path: Path) -> None:
    fill(tmp_path, "old")
    with pytest.raises(OSError), limited_file_size(100), staged_files(tmp_path) as staging:
        fill(staging, "new")
        (staging / "config.json").write_text("x" * 101)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}
    with staged_files(tmp_path) as staging:
        fill(staging, "new")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"new"}


def test_a_full_disk_is_a_failed_run(tmp_path: Path) -> None:
    import torch

    advice = "Free some space there; what was saved before is as it was"
    for folder in (tmp_path / "out", tmp_path / "out" / ".saving"):
        with pytest.raises(RunError) as caught, saving_errors(folder):
            raise OSError(28, "No space left on device")
        assert str(caught.value) == f"cannot save to {tmp_path / 'out'} (No space left on device). {advice}"
    with pytest.raises(RunError) as caught, limited_file_size(1000), saving_errors(tmp_path):
        torch.save(torch.zeros(10_000), tmp_path / "optimizer.pt")
    assert str(caught.value) == f"cannot save to {tmp_path} (torch.save could not write all of a file). {advice}"
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), saving_errors(tmp_path):
        raise RuntimeError("shapes differ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        full = pytest.raises(RunError, match="No space left on device")
        with full, saving_errors(tmp_path), staged_checkpoint(tmp_path / "checkpoint-1") as staged:
            staged.mkdir()
            (staged / "model.safetensors").write_bytes(bytes(100_000))
        assert names_in(tmp_path) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)
