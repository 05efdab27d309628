"""Every command that opens a folder refuses each faulty file in it: exit code 2, and one line that names the file."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

import finetune
import merge_lora
from scripts import ask, convert_layout, preview_data, quantize
from tests.commands import run_here
from tests.folder_faults import CONTENTS, FAULTS, PLACES, spoil
from tests.golden import SMALL
from tests.models import TINY, copy_checkpoint, write_conversations

MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "quantize_config.json", "model.safetensors.index.json", "tokenizer.json", "qwen.tiktoken", "chat_template.jinja",
    "model.safetensors",
)  # fmt: skip
ADAPTER_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "run_summary.json", "base_quantization.json",
    "generation_config.json", "tokenizer_config.json", "run_args.json",
)  # fmt: skip
ALL = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


@dataclass(frozen=True)
class Folders:
    model: Path
    adapter: Path
    data: Path
    output: Path


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    model = copy_checkpoint(tmp_path / "model")
    adapter = tmp_path / "adapter"
    shutil.copytree(SMALL / "training" / "lora_chat_adapter", adapter)
    return Folders(model, adapter, write_conversations(tmp_path / "data.json"), tmp_path / "out")


Main = Callable[[Sequence[str]], int | None]
Arguments = Callable[[Folders], list[object]]


def _run_flags(folders: Folders) -> list[object]:
    return ["--model_name_or_path", folders.model, "--data_path", folders.data]


def _training(folders: Folders) -> list[object]:
    return [*_run_flags(folders), "--output_dir", folders.output, "--use_cpu", "True"]


MODEL_COMMANDS: dict[str, tuple[Main, Arguments]] = {
    "finetune": (finetune.main, _training),
    "preview": (preview_data.main, _run_flags),
    "ask": (ask.main, lambda folders: ["--model_name_or_path", folders.model, "Hi"]),
    "merge": (
        merge_lora.main,
        lambda folders: ["--adapter", folders.adapter, "--base", folders.model, "--output", folders.output],
    ),
    "quantize": (quantize.main, lambda folders: [*_run_flags(folders), "--output_dir", folders.output]),
    "convert": (convert_layout.main, lambda folders: [folders.model, folders.output]),
}
ADAPTER_COMMANDS: dict[str, tuple[Main, Arguments]] = {
    "continue": (
        finetune.main,
        lambda folders: [*_training(folders), "--use_lora", "--lora_weight_path", folders.adapter],
    ),
    "ask": (
        ask.main,
        lambda folders: ["--model_name_or_path", folders.model, "--adapter", folders.adapter, "Hi"],
    ),
    "merge": MODEL_COMMANDS["merge"],
    "convert": (convert_layout.main, lambda folders: [folders.adapter, folders.output]),
}


def error_of(command: tuple[Main, Arguments], folders: Folders) -> str:
    """Run a command that must refuse its folders, and return its only line."""
    main, arguments = command
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as stderr:
        code = run_here(main, "command", arguments(folders))
    lines = [line for line in stderr.getvalue().splitlines() if line.startswith("command:")]
    assert code == 2 and len(lines) == 1 and lines[0] == stderr.getvalue().splitlines()[-1], stderr.getvalue()
    assert "unexpected" not in lines[0] and "Traceback" not in stderr.getvalue()
    assert not folders.output.exists()
    return lines[0]


RECORDS = ("run_args.json", "run_summary.json")  # a run that diverged records NaN and infinity


def _cases(commands: Sequence[str], files: Sequence[str]) -> list[tuple[str, str, str]]:
    """Every command with every fault, each time in the next of the files; all combinations in the nightly profile."""
    cases = []
    for index, name in enumerate(commands):
        for number, fault in enumerate(FAULTS):
            chosen = files if ALL else [files[(index + 3 * number) % len(files)]]
            cases += [
                (name, file, fault)
                for file in chosen
                if (file.endswith(".json") or fault in PLACES)
                and not (file in RECORDS and fault in ("NaN", "infinite"))
            ]
    return cases


@pytest.mark.parametrize(("name", "file", "fault"), _cases([*MODEL_COMMANDS], MODEL_FILES))
def test_faulty_file_of_a_model(folders: Folders, name: str, file: str, fault: str) -> None:
    spoil(folders.model / file, fault)
    assert str(folders.model / file) in error_of(MODEL_COMMANDS[name], folders)


@pytest.mark.parametrize(("name", "file", "fault"), _cases([*ADAPTER_COMMANDS], ADAPTER_FILES))
def test_faulty_file_of_an_adapter(folders: Folders, name: str, file: str, fault: str) -> None:
    spoil(folders.adapter / file, fault)
    assert str(folders.adapter / file) in error_of(ADAPTER_COMMANDS[name], folders)


def test_every_fault_meets_every_kind_of_file() -> None:
    for commands, files in (([*MODEL_COMMANDS], MODEL_FILES), ([*ADAPTER_COMMANDS], ADAPTER_FILES)):
        cases = _cases(commands, files)
        assert {file for _, file, _ in cases} == {*files}
        assert {fault for _, _, fault in cases} == {*PLACES, *CONTENTS}


@pytest.mark.parametrize("name", [*MODEL_COMMANDS])
@pytest.mark.parametrize("folder", ["x" * 300, "circle", "a\udcff", "model/config.json", "."])
def test_name_that_is_no_folder_of_a_model(folders: Folders, name: str, folder: str) -> None:
    (folders.model.parent / "circle").symlink_to("circle")
    path = Path(os.path.join(folders.model.parent, folder))
    error_of(MODEL_COMMANDS[name], Folders(path, folders.adapter, folders.data, folders.output))


@pytest.mark.parametrize("name", [*ADAPTER_COMMANDS])
@pytest.mark.parametrize("folder", ["x" * 300, "circle", "a\udcff", "model/config.json"])
def test_name_that_is_no_folder_of_an_adapter(folders: Folders, name: str, folder: str) -> None:
    (folders.model.parent / "circle").symlink_to("circle")
    path = Path(os.path.join(folders.model.parent, folder))
    error_of(ADAPTER_COMMANDS[name], Folders(folders.model, path, folders.data, folders.output))


@pytest.mark.parametrize("name", [*MODEL_COMMANDS])
def test_model_with_an_adapter_inside(folders: Folders, name: str) -> None:
    """transformers would apply it, and import what its config names."""
    shutil.copyfile(folders.adapter / "adapter_config.json", folders.model / "adapter_config.json")
    if name != "convert":  # which takes it for an adapter
        assert "contains a model and an adapter" in error_of(MODEL_COMMANDS[name], folders)


@pytest.mark.parametrize("pickled", ["code", "damaged", "not tensors", "names that are numbers"])
@pytest.mark.parametrize("name", ["ask", "merge", "convert"])
def test_pickle_that_is_not_loaded(folders: Folders, name: str, pickled: str) -> None:
    import pickle

    import torch

    (folders.model / "model.safetensors").unlink()
    path = folders.model / "pytorch_model.bin"
    if pickled == "code":
        torch.save({"a": _Payload()}, path)
    elif pickled == "damaged":
        path.write_bytes(pickle.dumps({"a": 1})[:-3] + b"\x94\x8c")
    else:
        torch.save({"a": 3} if pickled == "not tensors" else {3: torch.ones(2)}, path)
    assert str(path) in error_of(MODEL_COMMANDS[name], folders)
    assert not (TINY.parent / "ran").exists()


class _Payload:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(TINY.parent / "ran"),)


_TENSOR = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
_OVERLAPPING = b'{"a":' + _TENSOR + b',"b":' + _TENSOR + b"}"


@pytest.mark.parametrize(
    "header",
    [
        (1 << 62).to_bytes(8, "little") + b"{}",
        (1000).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (200_012).to_bytes(8, "little") + b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}      ",
        (112).to_bytes(8, "little") + _OVERLAPPING.ljust(112) + b"\0" * 8,
    ],
    ids=["absurd length", "beyond the file", "a list", "nested", "overlapping"],
)
@pytest.mark.parametrize("name", ["ask", "merge", "convert"])
def test_header_of_a_weight_file(folders: Folders, name: str, header: bytes) -> None:
    path = folders.model / "model.safetensors"
    path.write_bytes(header)
    assert str(path) in error_of(MODEL_COMMANDS[name], folders)
