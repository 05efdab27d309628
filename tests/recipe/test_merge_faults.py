"""Inputs that merge_lora.py refuses; failed or killed merges leave no output and unchanged inputs."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import export.companion_files
import merge_lora
from errors import ConfigError
from tests.commands import limited_file_size
from tests.golden import REPO, Golden
from tests.merging import merge, merge_well, message_of, names

BASE, ADAPTER = "model.safetensors", "adapter_model.safetensors"
Q = "transformer.h.0.attn.c_attn.weight"


@pytest.fixture
def golden(golden_small: Path) -> Golden:
    return Golden("small", golden_small)


@pytest.fixture
def inputs(golden: Golden, tmp_path: Path) -> Path:
    """A folder with the base ``tiny-qwen-small`` and an adapter of it."""
    shutil.copytree(golden.tiny, tmp_path / "in" / "tiny-qwen-small")
    shutil.copytree(golden.path / "training" / "lora_chat_adapter", tmp_path / "in" / "adapter")
    return tmp_path / "in"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(file: Path, name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = {each: tensor.clone() for each, tensor in load_file(file).items()}
    tensors[name] = make(tensors[name])
    save_file(tensors, file)


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return make


def as_index(folder: Path, **more_tensors: Any) -> None:
    (folder / BASE).rename(folder / "model-1.safetensors")
    weight_map = dict.fromkeys(load_file(folder / "model-1.safetensors"), "model-1.safetensors") | more_tensors
    (folder / f"{BASE}.index.json").write_text(json.dumps({"weight_map": weight_map}))


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def as_pickle(folder: Path, value: Any) -> None:
    (folder / BASE).unlink()
    torch.save(value, folder / "pytorch_model.bin")


def truncate(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


# ------------------------------------------------------------------------------------------------------------ bad input

LORA_A = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
FAULTS: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "truncated base": (lambda base, adapter: truncate(base / BASE, 100_000), "model.safetensors is damaged"),
    "base without header": (lambda base, adapter: (base / BASE).write_bytes(b"\xff" * 99), "is damaged or incomplete"),
    "truncated adapter": (lambda base, adapter: truncate(adapter / ADAPTER, 900), f"{ADAPTER} is damaged"),
    "integers in the base": (
        lambda base, adapter: change(base / BASE, Q, lambda tensor: tensor.to(torch.int32)),
        f"{Q} is stored as int32",
    ),
    "integers in the adapter": (
        lambda base, adapter: change(adapter / ADAPTER, LORA_A, lambda tensor: tensor.to(torch.int8)),
        f"{LORA_A} is stored as int8",
    ),
    "NaN in a changed tensor": (
        lambda base, adapter: change(base / BASE, Q, with_value(float("nan"))), f"{Q} holds NaN or infinity",
    ),
    "NaN in a copied tensor": (
        lambda base, adapter: change(base / BASE, "transformer.wte.weight", with_value(float("nan"))),
        "transformer.wte.weight holds NaN or infinity",
    ),
    "infinity in the adapter": (
        lambda base, adapter: change(adapter / ADAPTER, LORA_A, with_value(float("inf"))), "holds NaN or infinity",
    ),
    "adapter of another width": (
        lambda base, adapter: change(adapter / ADAPTER, LORA_A, lambda each: each[:, :5].clone()), "has shape (2, 5)",
    ),
    "index of missing tensors": (
        lambda base, adapter: as_index(base, more="model-1.safetensors"), "lacks the tensor more, which the index",
    ),
    "index of missing files": (
        lambda base, adapter: as_index(base, more="model-2.safetensors"), "model-2.safetensors is missing, but",
    ),
    "index with a path outside the folder": (
        lambda base, adapter: as_index(base, more="../adapter/adapter_model.safetensors"),
        "not the name of a weight file",
    ),
    "index of numbers": (lambda base, adapter: as_index(base, more=3), "not the name of a weight file"),
    "pickle with code": (lambda base, adapter: as_pickle(base, Harmful()), "contains other Python objects"),
    "pickle of a list": (lambda base, adapter: as_pickle(base, [1]), "does not contain named tensors"),
    "pickle of nested tensors": (
        lambda base, adapter: as_pickle(base, {"model": {"a": torch.ones(2)}}), "does not contain named tensors",
    ),
    "config without model_type": (
        lambda base, adapter: (base / "config.json").write_text("{}"), "has no model_type",
    ),
    "config that is a list": (
        lambda base, adapter: (base / "config.json").write_text("[]"), "config.json holds a list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_reported_and_unchanged(inputs: Path, tmp_path: Path, fault: str) -> None:
    damage, expected = FAULTS[fault]
    damage(inputs / "tiny-qwen-small", inputs / "adapter")
    before = contents(inputs)
    message = message_of(merge("--adapter", inputs / "adapter", "--output", tmp_path / "out", "--no_verify"))
    assert message.startswith("merge_lora.py: error: ") and expected in message
    assert names(tmp_path) == ["in"] and contents(inputs) == before
    assert not (REPO / "harm").exists()


def test_adapter_of_unknown_modules_is_refused(inputs: Path, tmp_path: Path) -> None:
    file = inputs / "adapter" / ADAPTER
    save_file({name.replace("c_attn", "query"): tensor for name, tensor in load_file(file).items()}, file)
    result = merge("--adapter", inputs / "adapter", "--output", tmp_path / "out")
    assert "query.lora_A.weight fits no tensor of the base" in message_of(result)
    assert names(tmp_path) == ["in"]


def test_adapters_of_different_bases_are_refused(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "adapter", inputs / "other")
    config = json.loads((inputs / "other" / "adapter_config.json").read_text())
    (inputs / "other" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "another"}))
    both = ["--adapter", inputs / "adapter", inputs / "other"]
    message = message_of(merge(*both, "--output", tmp_path / "out"))
    assert "were trained on different bases" in message and "(tiny-qwen-small)" in message and "(another)" in message
    base = ["--base", inputs / "tiny-qwen-small"]
    for name, record in (("adapter", "a" * 64), ("other", "b" * 64)):
        (inputs / name / "run_summary.json").write_text(json.dumps({"base_fingerprint": record}))
    result = merge(*both, *base, "--output", tmp_path / "out")
    assert result.returncode == 2 and "were trained on different bases" in result.stderr
    assert names(tmp_path) == ["in"]


def test_adapters_of_different_layouts_are_refused(inputs: Path, tmp_path: Path) -> None:
    other = inputs / "other"
    shutil.copytree(inputs / "adapter", other)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({name.format("A"): torch.zeros(2, 32), name.format("B"): torch.zeros(32, 2)}, other / ADAPTER)
    message = message_of(merge("--adapter", inputs / "adapter", other, "--output", tmp_path / "out"))
    assert "different layouts" in message and "scripts.convert_layout" in message


# --------------------------------------------------------------------------------------------------------- command line


def refuses(expected: str, *arguments: object) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_lora.main([str(argument) for argument in arguments])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_command_line_errors_name_flag_and_value(golden: Golden, inputs: Path, tmp_path: Path) -> None:
    output, adapter = tmp_path / "merged", inputs / "adapter"
    good = ["--adapter", adapter, "--base", golden.tiny, "--output"]
    refuses("required: --output", "--adapter", adapter)
    refuses("unrecognized arguments: --out_put x", *good, output, "--out_put", "x")
    refuses("argument --dtype: invalid choice: 'int8'", *good, output, "--dtype", "int8")
    refuses("argument --layout: invalid choice: 'llama'", *good, output, "--layout", "llama")
    refuses("--max_shard_size 2gigs: not a size", *good, output, "--max_shard_size", "2gigs")
    refuses("nowhere holds no adapter_config.json", "--adapter", tmp_path / "nowhere", "--output", output)
    refuses("'half' is not a weight", "--adapter", f"{adapter}=half", "--output", output)
    refuses("'nan' is not a weight", "--adapter", f"{adapter}=nan", "--output", output)
    refuses("is given twice", "--adapter", f"{adapter}=0.5", adapter, "--output", output)
    moved = shutil.copytree(adapter, tmp_path / "moved" / "adapter")
    refuses(f"names the base '{golden.tiny.name}'", "--adapter", moved, "--output", output)
    refuses("with --base DIR", "--adapter", moved, "--output", output)
    refuses(f"--base {adapter} has no config.json", *good[:2], "--base", adapter, "--output", output)
    refuses("is the folder of --adapter", *good, adapter)
    refuses("is the folder of --base", *good, golden.tiny)
    refuses("is inside the folder of --adapter", *good, adapter / "merged")
    assert names(tmp_path) == ["in", "moved"]


def test_output_that_is_a_symbolic_link_is_refused(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(inputs / "tiny-qwen-small")
    (tmp_path / "new").symlink_to(tmp_path / "absent")
    for name, expected in (("link", "is a symbolic link"), ("new", "is a symbolic link")):
        assert expected in message_of(merge("--adapter", inputs / "adapter", "--output", tmp_path / name))
    assert names(tmp_path) == ["in", "link", "new"]


def test_error_is_one_line_with_exit_code_2(inputs: Path, tmp_path: Path) -> None:
    for arguments, expected in (
        (["--any_base"], f"--output {inputs} is not empty"),
        (["--bse", "x"], "command line: unrecognized arguments: --bse"),
    ):
        result = merge("--adapter", inputs / "adapter", "--output", inputs, *arguments)
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith(f"merge_lora.py: error: {expected}") and result.stderr.count("\n") == 1
    assert names(inputs) == ["adapter", "tiny-qwen-small"]


def test_empty_output_folder_is_used(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge_well("--adapter", inputs / "adapter", "--output", tmp_path / "out", "--no_verify")
    assert "model.safetensors" in names(tmp_path / "out")


def test_flags_are_parsed_before_torch_is_imported() -> None:
    arguments = ["--adapter", "a", "--output", "b"]
    code = f"import sys, merge_lora; merge_lora.parse_args({arguments}); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


# ---------------------------------------------------------------------------------------------------------------- disks


def test_failure_during_writing_leaves_no_output(inputs: Path, tmp_path: Path) -> None:
    file = inputs / "tiny-qwen-small" / BASE
    last = sorted(load_file(file))[-1]
    change(file, last, lambda tensor: torch.full_like(tensor, 1e6))  # beyond the range of fp16
    output = tmp_path / "out" / "merged"
    result = merge("--adapter", inputs / "adapter", "--output", output, "--dtype", "fp16", "--max_shard_size", "1KB")
    assert f"merge_lora.py: error: {last} is not finite in float16. Try --dtype bf16" in message_of(result)
    assert names(output.parent) == []


def test_full_disk_is_one_line_with_exit_code_1(inputs: Path, tmp_path: Path) -> None:
    with limited_file_size(2000):
        result = merge("--adapter", inputs / "adapter", "--output", tmp_path / "merged")
    assert result.returncode == 1 and "merge_lora.py: error: cannot write " in message_of(result)
    assert names(tmp_path) == ["in"]


def test_free_space_is_checked_before_writing(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    result = merge("--adapter", inputs / "adapter", "--output", tmp_path / "merged")
    assert re.search(r"needs 0\.[1-9] MB, 0\.1 MB are free", message_of(result))
    assert names(tmp_path) == ["in"]


def test_unwritable_output_is_reported(inputs: Path) -> None:
    result = merge("--adapter", inputs / "adapter", "--output", "/proc/merged")
    assert "--output /proc/merged: /proc is not writable" in message_of(result)


# --------------------------------------------------------------------------------------------------------- verification


@pytest.mark.parametrize("layout", ["qwen", "qwen2"])
def test_wrong_merged_tensor_is_reported_and_nothing_is_kept(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    write_companion_files = export.companion_files.write_companion_files
    corrupted = {"qwen": "transformer.h.1.mlp.w2.weight", "qwen2": "model.layers.1.mlp.gate_proj.weight"}[layout]

    def corrupt_and_write(merge: Any, folder: Path) -> None:
        change(folder / BASE, corrupted, lambda tensor: tensor * 1.05)
        write_companion_files(merge, folder)

    monkeypatch.setattr("export.companion_files.write_companion_files", corrupt_and_write)
    arguments = ["--adapter", inputs / "adapter", "--output", tmp_path / "out", "--layout", layout]
    result = merge(*arguments)
    assert result.returncode == 1 and result.stdout == ""
    assert "error: the merged model is not what base and adapter give" in result.stderr
    assert "transformer.h.1.mlp.w2.weight: row " in result.stderr and "Nothing was kept" in result.stderr
    assert names(tmp_path) == ["in"]
    merge_well(*arguments, "--no_verify")  # corrupted tensors are written without the comparison


# --------------------------------------------------------------------------------------------------------------- killed

KILLED = """
import os, sys
import merge_lora, checkpoints.base_check, export.companion_files, export.inputs, export.merging
import export.verify.samples, export.verify.compare, torch
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    if (child := os.fork()) == 0:
        os.setpgid(0, 0)
        merge_lora.main(sys.argv[1:])
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_merge_leaves_no_output_or_a_complete_one(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "merged"
    command = [sys.executable, "-c", KILLED, "--adapter", str(inputs / "adapter"), "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    before, moments, codes = contents(inputs), random.Random(0), []
    with subprocess.Popen(
        command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        def run(kill_after: float | None) -> float:
            """Start a merge, kill it after ``kill_after`` seconds, and return its duration."""
            assert process.stdin is not None and process.stdout is not None
            print(file=process.stdin, flush=True)
            child, started = int(process.stdout.readline()), time.monotonic()
            if kill_after is not None:
                time.sleep(kill_after)
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            while not (code := process.stdout.readline().strip()).lstrip("-").isdigit():
                assert process.poll() is None  # the output of the merge itself
            codes.append(int(code))
            return time.monotonic() - started

        whole = run(None)
        expected = contents(output)
        shutil.rmtree(output)
        for _ in range(20):
            run(moments.uniform(0, whole))
            if output.exists():
                assert contents(output) == expected
                shutil.rmtree(output)
            assert set(names(output.parent)) <= {"merged.partial"}
        run(None)
        process.stdin.close()
    assert codes[0] == codes[-1] == 0 and -signal.SIGKILL in codes
    # The last merge has removed the leftovers of the killed ones.
    assert names(output.parent) == ["merged"] and contents(output) == expected
    assert contents(inputs) == before
