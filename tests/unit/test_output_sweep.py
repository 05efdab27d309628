"""Every command with every kind of unusable output: one line, exit code 2, and nothing is changed."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import run_here
from tests.golden import SMALL
from tests.models import TINY, write_conversations

BENCHMARKS = (
    "data",
    "engines",
    "kill_resume",
    "llama_cpp",
    "loss",
    "merge",
    "proof",
    "qlora",
    "quantize",
    "startup",
    "teach",
)


class Command(NamedTuple):
    """A command line up to its output.

    Attributes:
        words: with ``{in}`` for the folder of the inputs; the output follows.
        inputs: what it reads, in that folder.
    """

    module: str
    words: str
    inputs: tuple[str, ...] = ()


BENCHMARK_INPUTS = {
    "llama_cpp": "--model_name_or_path {in}/model ",
    "quantize": "--model_name_or_path {in}/model --data_path {in}/train.jsonl ",
    "teach": "--model_name_or_path {in}/model --general {in}/train.jsonl ",
}
_RUN = "--model_name_or_path {in}/model --data_path {in}/train.jsonl"
FOLDERS = {
    "finetune": Command("finetune", f"{_RUN} --use_lora --output_dir", ("model",)),
    "merge_lora": Command("merge_lora", "--adapter {in}/adapter --base {in}/model --output", ("adapter", "model")),
    "quantize": Command("scripts.quantize", f"{_RUN} --output_dir", ("model",)),
    "convert_layout": Command("scripts.convert_layout", "{in}/model", ("model",)),
    "make_tiny_qwen": Command("scripts.make_tiny_qwen", "--vocab_from {in}/model --output", ("model",)),
    "make_small_qwen": Command("scripts.make_small_qwen", "--wheel {in}/train.jsonl --output", ("train.jsonl",)),
}
FILES = {
    "preview --html": Command("scripts.preview_data", f"{_RUN} --html", ("train.jsonl", "model/config.json")),
    "preview --json": Command("scripts.preview_data", f"{_RUN} --json", ("train.jsonl", "model/qwen.tiktoken")),
    "preview --dump": Command("scripts.preview_data", f"{_RUN} --dump", ("train.jsonl", "model/config.json")),
    "export_gguf": Command("scripts.export_gguf", "{in}/model --outfile", ("model", "model/config.json")),
    "convert_data": Command("scripts.convert_data", "--overwrite {in}/train.jsonl", ("train.jsonl",)),
    "generate": Command("scripts.generate", f"{_RUN} --output", ("train.jsonl", "model/config.json")),
    "plot_runs": Command("scripts.plot_runs", "{in}/run --output", ("run/training_log.jsonl",)),
    "draw_masks": Command("scripts.draw_masks", "--output"),
    **{
        f"benchmarks.{name}": Command(f"benchmarks.{name}", BENCHMARK_INPUTS.get(name, "") + "--output")
        for name in BENCHMARKS
    },
}
COMMANDS = {**FOLDERS, **FILES}


def text_file(path: Path) -> Path:
    path.write_text("mine")
    return path


def full_folder(path: Path) -> Path:
    path.mkdir()
    text_file(path / "notes.txt")
    return path


def link(path: Path, target: Path | str) -> Path:
    path.symlink_to(target)
    return path


def named_pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def unix_socket(path: Path) -> Path:
    folder = os.open(path.parent, os.O_RDONLY)  # the names of sockets are limited to 108 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)
    return path


# By name: makes it at a path of the test, and returns the output to name.
ANYTHING: dict[str, Callable[[Path], Path | str]] = {
    "empty name": lambda path: "",
    "blank name": lambda path: " ",
    "stdout": lambda path: "-",
    "too long": lambda path: path.with_name("x" * 250 + ".jsonl"),
    "not UTF-8": lambda path: os.fsdecode(os.fsencode(path.parent) + b"/out-\xff.jsonl"),
    "device": lambda path: "/dev/null",
    "link to a device": lambda path: link(path, "/dev/null"),
    "named pipe": named_pipe,
    "socket": unix_socket,
    "dangling link": lambda path: link(path, "nowhere/at/all"),
    "looping link": lambda path: link(path, path.name),
    "in a file": lambda path: text_file(path) / "out.jsonl",
    "in a dangling link": lambda path: link(path, "nowhere") / "out.jsonl",
    "in a looping link": lambda path: link(path, path.name) / "out.jsonl",
    "in a device": lambda path: "/dev/null/out.jsonl",
    # For root, too: it has the permission there, and still cannot create a file.
    "not writable": lambda path: "/proc/sys/out.jsonl",
}
INSTEAD_OF_A_FILE = {
    "folder": full_folder,
    "no folder": lambda path: path.with_name("absent") / "out.jsonl",
    "link to a folder": lambda path: link(path, full_folder(path.with_name("full"))),
}
INSTEAD_OF_A_FOLDER = {"file": text_file, "full folder": full_folder}
CASES = [
    *((name, kind, make) for name in COMMANDS for kind, make in ANYTHING.items()),
    *((name, kind, make) for name in FILES for kind, make in INSTEAD_OF_A_FILE.items()),
    *((name, kind, make) for name in FOLDERS for kind, make in INSTEAD_OF_A_FOLDER.items()),
]
INPUTS = [(name, source) for name, command in COMMANDS.items() for source in command.inputs]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(TINY, folder / "model")
    shutil.copytree(SMALL / "training" / "lora_chat_adapter", folder / "adapter")
    write_conversations(folder / "train.jsonl")
    (folder / "run").mkdir()
    (folder / "run" / "training_log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return folder


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return what is below a folder: kind, size and time of every entry, links not followed."""
    found = {str(path): os.lstat(path) for path in folder.rglob("*")}
    return {name: (status.st_mode, status.st_size, status.st_mtime_ns) for name, status in found.items()}


def refuse(
    name: str, output: Path | str, inputs: Path, folders: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a command that must refuse its output and change nothing in the folders; return its message."""
    command, before = COMMANDS[name], [tree(folder) for folder in (inputs, *folders)]
    main = importlib.import_module(command.module).main
    words = [word.replace("{in}", str(inputs)) for word in command.words.split()]
    capsys.readouterr()
    code = run_here(main, command.module, [*words, output])
    captured = capsys.readouterr()
    message = captured.err.splitlines()[-1]
    assert code == 2 and captured.out == "", captured
    assert "error: " in message and "unexpected" not in message and "Traceback" not in captured.err, captured.err
    flag = "OUT" if command.module in ("scripts.convert_data", "scripts.convert_layout") else words[-1]
    assert flag in message, message
    if not name.startswith("benchmarks"):  # argparse's own parser shows the usage first
        assert captured.err.count("\n") == 1, captured.err
    assert [tree(folder) for folder in (inputs, *folders)] == before
    return message


@pytest.mark.parametrize(("name", "kind", "make"), CASES, ids=[f"{name}-{kind}" for name, kind, _ in CASES])
def test_unusable_output_is_refused(
    name: str,
    kind: str,
    make: Callable[[Path], Path | str],
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # for relative names
    device = os.stat("/dev/null")
    refuse(name, make(tmp_path / "out.jsonl"), inputs, (tmp_path,), capsys)
    assert os.stat("/dev/null").st_rdev == device.st_rdev


@pytest.mark.parametrize(("name", "source"), INPUTS)
def test_input_is_refused_as_output_under_any_name(
    name: str, source: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = inputs / source
    outputs = [path, Path(os.path.relpath(path)), link(tmp_path / "link.jsonl", path), inputs / "." / source]
    if path.is_dir():
        outputs += [path / "new", tmp_path / "link.jsonl" / "new"]
    else:
        (tmp_path / "second.jsonl").hardlink_to(path)
        outputs += [tmp_path / "second.jsonl", link(tmp_path / "folder", path.parent) / path.name]
    if source.startswith("model/"):
        outputs += [path.parent / "report.html", path.parent / "sub" / ".." / "report.json"]
    for output in outputs:
        refuse(name, output, inputs, (tmp_path,), capsys)


@pytest.mark.parametrize("name", [name for name in COMMANDS if not name.startswith("benchmarks.")])
def test_deleted_working_folder_is_one_line(
    name: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    command = COMMANDS[name]
    words = [word.replace("{in}", str(inputs)) for word in command.words.split()]
    assert run_here(importlib.import_module(command.module).main, command.module, [*words, "out.jsonl"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "error: the current folder cannot be used" in captured.err


def test_one_report_is_not_written_over_the_other(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.preview_data import main

    words = [word.replace("{in}", str(inputs)) for word in _RUN.split()]
    same = ["--json", tmp_path / "report", "--html", tmp_path / "report"]
    assert run_here(main, "scripts.preview_data", [*words, *same]) == 2
    assert "is the file of --json" in capsys.readouterr().err and not list(tmp_path.iterdir())
