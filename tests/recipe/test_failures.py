"""Refused commands: one line that names the fault, exit code 2, and no files that look like a result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import finetune
from tests.commands import free_port, names_in, run, run_all, run_here
from tests.golden import SMALL
from tests.models import TINY, copy_checkpoint, write_conversations

VALID = '{"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}]}'


@dataclass
class Case:
    """A valid command line with one fault. ``{x}`` in ``message`` and ``flags`` is the case's folder.

    Attributes:
        message: start of the error line, after "finetune.py: error: ".
        flags: replaced or added flags of finetune.py.
        setup: prepares the case's folder, which contains a valid train.json.
        starts: the run reads data or weights, so progress bars may precede the error line.
    """

    message: str
    flags: dict[str, str] = field(default_factory=dict)
    setup: Callable[[Path], object] = lambda folder: None
    starts: bool = False


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def append(file: Path, content: bytes) -> None:
    file.write_bytes(file.read_bytes() + content)


def insert_nan(file: Path, name: str) -> None:
    tensors = load_file(file)
    tensors[name][3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def write_records(file: Path, *records: object) -> None:
    """Write records as lines, after a valid one."""
    file.write_text("".join(f"{line}\n" for line in [VALID, *map(json.dumps, records)]))


def cut_adapter(folder: Path) -> None:
    """Copy the golden adapter with half of the columns of its first matrix."""
    shutil.copytree(SMALL / "training" / "lora_chat_adapter", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = min(tensors)
    tensors[name] = tensors[name][:, ::2].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


USER = {"from": "user", "value": "Hi"}


CASES = {
    "wrong flag": Case("command line: unknown flag --lora_rank (did you mean ", {"--lora_rank": "8"}),
    "wrong value": Case("command line: --lora_r many: expected a whole number. ", {"--lora_r": "many"}),
    "no data file": Case("--data_path {x}/none.json: there is no such file. ", {"--data_path": "{x}/none.json"}),
    "broken json": Case(
        "{x}/train.json:2:95: not valid JSON: ",
        setup=lambda x: (x / "train.json").write_text(f'[{VALID},\n{VALID[:-1]} "id": 1}}\n]'),
    ),
    "broken line": Case(
        "{x}/train.json:3:1: not valid JSON: ",
        setup=lambda x: (x / "train.json").write_text(f"{VALID}\n\nnot json\n{VALID}\n"),
    ),
    "unknown role": Case(
        "{x}/train.json:2: turn 1 is from an unknown role, 'robot' (read as conversations). ",
        setup=lambda x: (x / "train.json").write_text(f"{VALID}\n{VALID.replace('user', 'robot')}\n"),
    ),
    "empty conversation": Case(
        '{x}/train.json:2: "conversations" is empty (read as conversations). ',
        setup=lambda x: write_records(x / "train.json", {"conversations": []}),
    ),
    "no conversation": Case(
        "{x}/train.json:2: the record has no \"conversations\", its fields are ['text'] (read as conversations). ",
        setup=lambda x: write_records(x / "train.json", {"text": "Hi"}),
    ),
    "value is no string": Case(
        '{x}/train.json:2: the "value" of turn 2 must be a string, not 7 (read as conversations). ',
        setup=lambda x: write_records(x / "train.json", {"conversations": [USER, {"from": "assistant", "value": 7}]}),
    ),
    "no answer": Case(
        "{x}/train.json:2: the conversation has no assistant turn to train. ",
        setup=lambda x: write_records(x / "train.json", {"conversations": [USER, USER]}),
    ),
    "wrong encoding": Case(
        "{x}/train.json: the file is UTF-16, not UTF-8. Save the file as UTF-8",
        setup=lambda x: (x / "train.json").write_bytes(VALID.encode("utf-16")),
    ),
    "a folder without data": Case(
        "{x}/empty: the folder contains no data files. ", {"--data_path": "{x}/empty"}, lambda x: (x / "empty").mkdir()
    ),
    "empty file": Case(
        "{x}/train.json: the file contains no conversations. ", setup=lambda x: (x / "train.json").write_text("")
    ),
    "empty list": Case(
        "{x}/train.json: the file contains no conversations. ", setup=lambda x: (x / "train.json").write_text("[]\n")
    ),
    "nothing fits": Case("{x}/train.json: nothing is left to train on: ", {"--model_max_length": "4"}, starts=True),
    "no model": Case("--model_name_or_path {x}/none: there is no such folder. ", {"--model_name_or_path": "{x}/none"}),
    "no hub model": Case(
        "--model_name_or_path nobody/none: no such folder, not in the local cache, and the hub cannot be reached. ",
        {"--model_name_or_path": "nobody/none"},
    ),
    "no weights": Case(
        "--model_name_or_path {x}/model holds no weights ",
        {"--model_name_or_path": "{x}/model"},
        lambda x: (copy_checkpoint(x / "model") / "model.safetensors").unlink(),
    ),
    "truncated weights": Case(
        "--model_name_or_path {x}/model/model.safetensors is damaged or incomplete ",
        {"--model_name_or_path": "{x}/model"},
        lambda x: truncate(copy_checkpoint(x / "model") / "model.safetensors", 90_000),
    ),
    "weights with NaN": Case(
        "{x}/model/model.safetensors: transformer.h.1.ln_2.weight holds NaN or infinity in float32. ",
        {"--model_name_or_path": "{x}/model"},
        lambda x: insert_nan(copy_checkpoint(x / "model") / "model.safetensors", "transformer.h.1.ln_2.weight"),
        starts=True,
    ),
    "unknown model": Case(
        "{x}/model/config.json: model_type 'llama' is not supported. ",
        {"--model_name_or_path": "{x}/model"},
        lambda x: copy_checkpoint(x / "model", model_type="llama"),
    ),
    "no ranks": Case(
        "{x}/model: qwen.tiktoken is missing. ",
        {"--model_name_or_path": "{x}/model"},
        lambda x: (copy_checkpoint(x / "model") / "qwen.tiktoken").unlink(),
    ),
    "rank twice": Case(
        "{x}/model/qwen.tiktoken:701: rank 5 occurs a second time. ",
        {"--model_name_or_path": "{x}/model"},
        lambda x: append(copy_checkpoint(x / "model") / "qwen.tiktoken", b"enp6eno= 5\n"),
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
    "output in the model": Case(
        "--output_dir {x}/model/out is inside --model_name_or_path {x}/model. ",
        {"--model_name_or_path": "{x}/model", "--output_dir": "{x}/model/out"},
        lambda x: copy_checkpoint(x / "model"),
    ),
    "output is a file": Case(
        "--output_dir {x}/out is a file. ",
        setup=lambda x: (x / "out").write_text("mine"),
    ),
    "adapter of other shapes": Case(
        "--lora_weight_path {x}/adapter: base_model.model.transformer.h.0.attn.c_attn.lora_A.weight has shape (2, 16), "
        "base and adapter_config.json ask for (2, 32). ",
        {"--lora_weight_path": "{x}/adapter"},
        lambda x: cut_adapter(x / "adapter"),
        starts=True,
    ),
    "no such layer": Case(
        "--lora_target_modules q_proj: the model has no such layers. ", {"--lora_target_modules": "q_proj"}, starts=True
    ),
}


def prepare(name: str, folder: Path) -> list[str]:
    """Prepare a case in ``folder``, and return the arguments of its command line."""
    case = CASES[name]
    write_conversations(folder / "train.json")
    case.setup(folder)
    flags = {
        "--model_name_or_path": str(TINY), "--data_path": f"{folder}/train.json", "--output_dir": f"{folder}/out"
    }  # fmt: skip
    flags |= {flag: value.replace("{x}", str(folder)) for flag, value in case.flags.items()}
    return ["--use_lora", *(word for pair in flags.items() for word in pair)]


def check(name: str, folder: Path, code: int, out: str, err: str) -> None:
    """Check the error line, the exit code and that the output folder is empty."""
    case, lines = CASES[name], err.splitlines()
    assert lines[-1].startswith("finetune.py: error: " + case.message.replace("{x}", str(folder))), err
    assert case.starts or len(lines) == 1, err
    assert "Traceback" not in err
    assert (code, out) == (2, "")
    assert names_in(folder / "out") == (["mine.txt"] if name == "full output" else [])
    if name == "output is the model":
        assert names_in(folder / "model") == names_in(TINY)


@pytest.mark.parametrize("name", CASES)
def test_fault_is_one_line_with_exit_code_2(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = prepare(name, tmp_path)
    capfd.readouterr()
    code = run_here(finetune.main, "finetune.py", arguments)
    check(name, tmp_path, code, *capfd.readouterr())


def test_faults_in_separate_processes(tmp_path: Path) -> None:
    """In a separate process nothing else is printed while Python starts or exits."""
    names = ["wrong flag", "truncated weights"]
    folders = {name: tmp_path / name.replace(" ", "_") for name in names}
    for folder in folders.values():
        folder.mkdir()
    commands = [["finetune.py", *prepare(name, folder)] for name, folder in folders.items()]
    for (name, folder), result in zip(folders.items(), run_all(commands, is_new=True), strict=True):
        check(name, folder, result.returncode, result.stdout, result.stderr)


def test_several_faults_of_a_file_are_reported_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_conversations(tmp_path / "train.json")
    faulty = [{"text": 1}, {"conversations": []}, {"conversations": [USER]}]
    arguments = ["--use_lora", "--model_name_or_path", TINY, "--output_dir", tmp_path / "out"]
    for count, title, last in ((1, "4 faults", "5:1: not valid JSON: "), (9, "the first 20 faults", "21: ")):
        path = tmp_path / f"{count}.jsonl"
        write_records(path, *faulty * count)
        append(path, b"not json\n")
        capfd.readouterr()
        assert run_here(finetune.main, "finetune.py", [*arguments, "--data_path", path]) == 2
        first, *lines = capfd.readouterr().err.splitlines()
        assert first == f"finetune.py: error: --data_path: {title}:"
        assert lines.pop() == "  --on_bad_record skip leaves such records out"
        first_fault = "the record has no \"conversations\", its fields are ['text'] (read as conversations). "
        assert lines[0].startswith(f"  1. {path}:2: {first_fault}")
        assert lines[1].startswith(f'  2. {path}:3: "conversations" is empty (read as conversations). ')
        assert lines[-1].startswith(f"  {len(lines)}. {path}:{last}")
        assert len(lines) == min(3 * count + 1, 20)
    assert not (tmp_path / "out").exists()


def test_several_processes_report_a_fault_once(tmp_path: Path) -> None:
    write_records(tmp_path / "train.json", {"conversations": []})
    result = run(
        "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port(), "finetune.py",
        "--model_name_or_path", TINY, "--data_path", tmp_path / "train.json", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    errors = [line for line in result.stderr.splitlines() if line.startswith(("finetune.py:", "finetune.py ["))]
    assert errors == [
        f'finetune.py [rank 0]: error: {tmp_path}/train.json:2: "conversations" is empty (read as conversations). '
        "Give it at least one turn, or remove the record"
    ]
    assert result.returncode != 0


def test_faults_of_other_commands(tmp_path: Path) -> None:
    adapter, cut = SMALL / "training" / "lora_chat_adapter", tmp_path / "cut"
    cut_adapter(cut)
    first_matrix = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    cases = {
        "merge_lora.py: error: command line: unrecognized arguments: --adaptor x. ": [
            "merge_lora.py", "--adapter", "a", "--output", tmp_path / "out", "--adaptor", "x"
        ],
        f"merge_lora.py: error: --adapter {tmp_path / 'none'} holds no adapter_config.json. ": [
            "merge_lora.py", "--adapter", tmp_path / "none", "--output", tmp_path / "out"
        ],
        f"merge_lora.py: error: the adapter {adapter} names the base 'tiny-qwen-small', which is not a model folder ": [
            "merge_lora.py", "--adapter", adapter, "--output", tmp_path / "out"
        ],
        f"merge_lora.py: error: {cut}: {first_matrix} has shape (2, 16), base and adapter_config.json ask for ": [
            "merge_lora.py", "--adapter", cut, "--output", tmp_path / "out", "--base", TINY
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
    assert names_in(tmp_path) == ["cut"]


def test_unknown_flag_is_refused_before_torch_is_imported() -> None:
    trace = ["-X", "importtime"]
    for result in run_all([[*trace, "merge_lora.py", "--x"], [*trace, "-m", "scripts.ask", "--x"]]):
        assert result.returncode == 2
        assert not [line for line in result.stderr.splitlines() if line.split("|")[-1].strip() == "torch"]
