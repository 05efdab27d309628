"""A user's mistake ends a command with one line that names it, exit code 2, and nothing that looks like a result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import finetune
from tests.commands import names_in, run_all, run_here
from tests.models import TINY, copy_checkpoint, write_conversations

SOUND = '{"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}]}'


@dataclass
class Case:
    """A command line that is good but for one thing. In ``message`` and ``flags`` {x} stands for the case's folder.

    Attributes:
        setup: makes what the case needs in its folder, which holds a good train.json.
        flags: replaced or added flags of finetune.py.
        message: how the error line goes on behind "finetune.py: error: ".
        starts: whether the run gets as far as reading the checkpoint's weights, so that bars may come before the line.
    """

    message: str
    flags: dict[str, str] = field(default_factory=dict)
    setup: Callable[[Path], object] = lambda folder: None
    starts: bool = False


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


CASES = {
    "wrong flag": Case("command line: --lora_rank is no known flag. ", {"--lora_rank": "8"}),
    "wrong value": Case("command line: argument --lora_r", {"--lora_r": "many"}),
    "no data file": Case("--data_path {x}/none.json: there is no such file. ", {"--data_path": "{x}/none.json"}),
    "broken json": Case(
        "{x}/train.json:2:95: not valid JSON: ",
        setup=lambda x: (x / "train.json").write_text(f'[{SOUND},\n{SOUND[:-1]} "id": 1}}\n]'),
    ),
    "broken line": Case(
        "{x}/train.json:3:1: not valid JSON: ",
        setup=lambda x: (x / "train.json").write_text(f"{SOUND}\n\nnot json\n{SOUND}\n"),
    ),
    "unknown role": Case(
        "{x}/train.json:2: turn 1 is from an unknown role, 'robot'. ",
        setup=lambda x: (x / "train.json").write_text(f"{SOUND}\n{SOUND.replace('user', 'robot')}\n"),
    ),
    "empty file": Case(
        "{x}/train.json: the file holds no conversations. ", setup=lambda x: (x / "train.json").write_text("")
    ),
    "empty list": Case(
        "{x}/train.json: the file holds no conversations. ", setup=lambda x: (x / "train.json").write_text("[]\n")
    ),
    "nothing fits": Case("{x}/train.json: nothing is left to train on: ", {"--model_max_length": "4"}, starts=True),
    "no model": Case("--model_name_or_path {x}/none: there is no such folder. ", {"--model_name_or_path": "{x}/none"}),
    "no hub model": Case(
        "--model_name_or_path nobody/none: no such folder, and the model could not be fetched from the hub. ",
        {"--model_name_or_path": "nobody/none"},
    ),
    "no weights": Case(
        "--model_name_or_path {x}/model: ",
        {"--model_name_or_path": "{x}/model"},
        lambda x: (copy_checkpoint(x / "model") / "model.safetensors").unlink(),
        starts=True,
    ),
    "truncated weights": Case(
        "--model_name_or_path {x}/model: ",
        {"--model_name_or_path": "{x}/model"},
        lambda x: truncate(copy_checkpoint(x / "model") / "model.safetensors", 90_000),
        starts=True,
    ),
    "truncated ranks": Case(
        "{x}/model: end-of-text is id 512 in qwen.tiktoken and 700 in generation_config.json. ",
        {"--model_name_or_path": "{x}/model"},
        lambda x: (copy_checkpoint(x / "model") / "qwen.tiktoken").write_bytes(
            b"".join((TINY / "qwen.tiktoken").read_bytes().splitlines(keepends=True)[:512])
        ),
    ),
    "full output": Case(
        "--output_dir {x}/out is not empty. ",
        setup=lambda x: ((x / "out").mkdir(), (x / "out" / "mine.txt").write_text("mine")),
    ),
    "output is the model": Case(
        "--output_dir {x}/model is the model's own folder. ",
        {"--model_name_or_path": "{x}/model", "--output_dir": "{x}/model"},
        lambda x: copy_checkpoint(x / "model"),
    ),
    "no such layer": Case(
        "--lora_target_modules q_proj: the model has no such layers. ", {"--lora_target_modules": "q_proj"}, starts=True
    ),
}


def prepare(name: str, folder: Path) -> list[str]:
    """Make a case in ``folder``; returns the command line's arguments."""
    case = CASES[name]
    write_conversations(folder / "train.json")
    case.setup(folder)
    flags = {
        "--model_name_or_path": str(TINY), "--data_path": f"{folder}/train.json", "--output_dir": f"{folder}/out"
    }  # fmt: skip
    flags |= {flag: value.replace("{x}", str(folder)) for flag, value in case.flags.items()}
    return ["--use_lora", *(word for pair in flags.items() for word in pair)]


def check(name: str, folder: Path, code: int, out: str, err: str) -> None:
    """One line on stderr, which names the fault; nothing in the output folder."""
    case, lines = CASES[name], err.splitlines()
    assert lines[-1].startswith("finetune.py: error: " + case.message.replace("{x}", str(folder))), err
    assert case.starts or len(lines) == 1, err
    assert "Traceback" not in err
    assert (code, out) == (2, "")
    assert names_in(folder / "out") == (["mine.txt"] if name == "full output" else [])
    if name == "output is the model":
        assert names_in(folder / "model") == names_in(TINY)


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_and_exit_code_2(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = prepare(name, tmp_path)
    capfd.readouterr()
    code = run_here(finetune.main, "finetune.py", arguments)
    check(name, tmp_path, code, *capfd.readouterr())


def test_mistakes_as_a_user_makes_them(tmp_path: Path) -> None:
    """The same in processes of their own: nothing that is printed while Python starts or ends comes to it."""
    names = ["wrong flag", "broken json", "truncated weights"]
    folders = {name: tmp_path / name.replace(" ", "_") for name in names}
    for folder in folders.values():
        folder.mkdir()
    commands = [["finetune.py", *prepare(name, folder)] for name, folder in folders.items()]
    for (name, folder), result in zip(folders.items(), run_all(commands), strict=True):
        check(name, folder, result.returncode, result.stdout, result.stderr)


def test_mistakes_of_the_other_commands(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    cases = {
        "merge_lora.py: error: command line: unrecognized arguments: --adaptor x. ": [
            "merge_lora.py", "--adapter", "a", "--output", tmp_path / "out", "--adaptor", "x"
        ],
        f"merge_lora.py: error: --adapter {tmp_path / 'none'} holds no adapter_config.json. ": [
            "merge_lora.py", "--adapter", tmp_path / "none", "--output", tmp_path / "out"
        ],
        "scripts.ask: error: command line: unrecognized arguments: --temperature=0.5. ": [
            "-m", "scripts.ask", "--model_name_or_path", TINY, "--temperature=0.5", "Hi"
        ],
        "scripts.ask: error: --model_name_or_path nowhere: there is no such folder. ": [
            "-m", "scripts.ask", "--model_name_or_path", "nowhere", "Hi"
        ],
    }  # fmt: skip
    for expected, result in zip(cases, run_all(list(cases.values())), strict=True):
        assert result.stderr.startswith(expected), result.stderr
        assert result.stderr.count("\n") == 1
        assert (result.returncode, result.stdout) == (2, "")
    assert names_in(tmp_path) == ["model"]


def test_a_wrong_flag_is_answered_at_once() -> None:
    """Before torch is loaded, for the commands that need it late."""
    trace = ["-X", "importtime"]
    for result in run_all([[*trace, "merge_lora.py", "--x"], [*trace, "-m", "scripts.ask", "--x"]]):
        assert result.returncode == 2
        assert not [line for line in result.stderr.splitlines() if line.split("|")[-1].strip() == "torch"]
