"""Output folders that a run accepts, and the files it removes from them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from errors import ConfigError
from ownership import MARK, OwnedFolder
from tests.commands import names_in
from tests.models import TINY, copy_checkpoint, write_conversations
from training.config.args import RunArguments
from training.config.parsing import parse_args
from training.run_folder.prepare import check_output, prepare_output


def arguments(output: Path, *flags: object, model: Path = TINY) -> RunArguments:
    argv = ["--model_name_or_path", model, "--data_path", output.parent / "train.json", "--output_dir", output, *flags]
    return parse_args([str(word) for word in argv])


def refuses(args: RunArguments, message: str) -> None:
    """Check the message, and that nothing is changed."""
    root = args.output_dir.parent
    before = sorted(root.rglob("*"))
    for check in (check_output, prepare_output):
        with pytest.raises(ConfigError) as caught:
            check(args)
        assert str(caught.value) == message
    assert sorted(root.rglob("*")) == before


def leave_mark(folder: Path) -> None:
    """Mark a folder as a killed process leaves it."""
    owned = OwnedFolder(folder, "x")
    text = (folder / MARK).read_text()
    owned.release()
    (folder / MARK).write_text(text)


def write_run(folder: Path, *steps: int) -> Path:
    """Write the folder of an earlier run."""
    for name in ("training_log.jsonl", "run_summary.json", "model.safetensors", "config.json", "qwen.tiktoken"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    return folder


# ------------------------------------------------------------------------------------------------- refused and accepted


def test_new_and_empty_folders_are_accepted_and_unchanged(tmp_path: Path) -> None:
    prepare_output(arguments(tmp_path / "a" / "b" / "out"))
    assert names_in(tmp_path) == []
    (tmp_path / "out").mkdir()
    for flags in ([], ["--overwrite_output_dir"]):
        prepare_output(arguments(tmp_path / "out", *flags))
    assert names_in(tmp_path / "out") == []


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refuses(arguments(tmp_path / "out"), f"--output_dir {tmp_path / 'out'} is a file. Give a folder")
    inside = tmp_path / "out" / "x"
    refuses(arguments(inside), f"--output_dir {inside}: {tmp_path / 'out'} is a file. Give a folder")


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    refuses(arguments(output), f"--output_dir {output} is not empty. Give a new folder")


def test_a_folder_of_an_earlier_run_is_refused_with_alternatives(tmp_path: Path) -> None:
    output = write_run(tmp_path / "out")
    start_over = "start over with --overwrite_output_dir, which removes what that run wrote"
    refuses(arguments(output), f"--output_dir {output} is not empty. Give a new folder, or {start_over}")
    write_run(output, 2, 10)
    resume = f"resume with --resume_from_checkpoint {output / 'checkpoint-10'}"
    refuses(arguments(output), f"--output_dir {output} is not empty. Give a new folder, or {resume}, or {start_over}")


def test_the_folder_of_the_resumed_checkpoint_is_accepted(tmp_path: Path) -> None:
    output = write_run(tmp_path / "out", 2)
    before = names_in(output)
    for value in ("True", output / "checkpoint-2"):
        prepare_output(arguments(output, "--resume_from_checkpoint", value))
    assert names_in(output) == [
        name for name in before if name != "run_summary.json"
    ]  # the run has not finished any more
    other = write_run(tmp_path / "other", 2)
    with pytest.raises(ConfigError, match=f"^--output_dir {output} is not empty"):
        check_output(arguments(output, "--resume_from_checkpoint", other / "checkpoint-2"))
    prepare_output(arguments(tmp_path / "new", "--resume_from_checkpoint", other / "checkpoint-2"))


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--lora_weight_path"])
def test_a_folder_inside_or_around_an_input_is_refused(tmp_path: Path, flag: str) -> None:
    model = copy_checkpoint(tmp_path / "models" / "tiny")
    (model / "run_summary.json").write_text("{}")  # as if finetune.py had made it
    named = "the model's own folder" if flag == "--model_name_or_path" else "the folder of --lora_weight_path"
    flags = [flag, model, "--use_lora", "--overwrite_output_dir"]
    (tmp_path / "link").symlink_to(model)
    for output in (model, tmp_path / "models" / ".." / "models" / "tiny", tmp_path / "link"):
        refuses(arguments(output, *flags), f"--output_dir {output} is {named}. Give another folder")
    for output, relation in ((model / "out", "is inside"), (tmp_path / "models", "contains"), (tmp_path, "contains")):
        what = f"--output_dir {output} {relation} {flag} {model}"
        refuses(arguments(output, *flags), f"{what}. Give a separate folder")


def test_a_folder_that_is_not_writable_is_refused(tmp_path: Path) -> None:
    """For root /proc/sys: it has the permission there, and still cannot create a file."""
    if os.geteuid() == 0:
        parent, reason = Path("/proc/sys"), None
    else:
        parent, reason = tmp_path / "closed", "permission denied"
        parent.mkdir(mode=0o555)
    with pytest.raises(ConfigError) as caught:
        check_output(arguments(parent / "out"))
    message = str(caught.value)
    assert message.startswith(f"--output_dir {parent / 'out'}: {parent} is not writable ({reason or ''}")
    assert message.endswith("). Choose a writable folder")


# ----------------------------------------------------------------------------------------------- --overwrite_output_dir


def test_overwriting_removes_all_files_of_a_run(tmp_path: Path) -> None:
    output = write_run(tmp_path / "out", 2, 4)
    for name in ("adapter_model.safetensors", "model-00001-of-00002.safetensors", "run_args.json"):
        (output / name).write_text("")
    for name in ("runs/Nov21_host", "profile", ".saving/checkpoint-6", ".x.json.partial"):
        (output / name).mkdir(parents=True)
    (output / "runs" / "Nov21_host" / "events.out.tfevents.1.host.2.0").write_text("")
    (output / "profile" / "trace.json").write_text("")
    (output / "profile" / "operators.txt").write_text("")
    for name in (".saving", ".x.json.partial"):
        leave_mark(output / name)
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
def test_overwriting_refuses_folders_with_other_files(
    tmp_path: Path, adds: Callable[[Path], object], name: str
) -> None:
    output = write_run(tmp_path / "out", 2)
    adds(output)
    refuses(
        arguments(output, "--overwrite_output_dir"),
        f"--overwrite_output_dir: {output} contains {name}, which finetune.py does not write. "
        "Move it away, or give another --output_dir",
    )


def test_overwriting_refuses_a_model_that_no_run_wrote(tmp_path: Path) -> None:
    """Runs write all of its file names too."""
    output = copy_checkpoint(tmp_path / "downloaded")
    refuses(
        arguments(output, "--overwrite_output_dir"),
        f"--overwrite_output_dir: {output} is not the folder of a run, it has no training_log.jsonl. "
        "Give another --output_dir, or remove its files yourself",
    )


def test_overwriting_refuses_to_remove_inputs_of_the_run(tmp_path: Path) -> None:
    output = write_run(tmp_path / "out", 2)
    data = write_conversations(output / "config.json")
    refuses(
        arguments(output, "--overwrite_output_dir", "--data_path", data),
        f"--overwrite_output_dir: --data_path {data} is inside --output_dir {output}. Move the data away",
    )
    resumed = output / "checkpoint-2"
    refuses(
        arguments(output, "--overwrite_output_dir", "--resume_from_checkpoint", resumed),
        f"--overwrite_output_dir would remove the checkpoint of --resume_from_checkpoint {resumed}. "
        "Leave one of them out",
    )


def test_only_rank_0_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write_run(tmp_path / "out", 2)
    before = names_in(output)
    monkeypatch.setenv("RANK", "1")
    prepare_output(arguments(output, "--overwrite_output_dir"))
    assert names_in(output) == before
