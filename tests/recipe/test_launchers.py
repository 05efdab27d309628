"""The launchers of finetune/ under a POSIX shell: their options, their faults, and what reaches finetune.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden import REPO, SMALL, offline_environment

LORA = "finetune_lora_single_gpu.sh"
FULL = "finetune_single_gpu.sh"
QLORA = "finetune_qlora_single_gpu.sh"
EACH = pytest.mark.parametrize("name", [LORA, FULL, QLORA])

CONVERSATION = {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}]}


def launch(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a launcher from ``cwd`` under dash where there is one, without a GPU."""
    environment = {**offline_environment(), "CUDA_VISIBLE_DEVICES": ""}
    # In a checkout without .venv the launchers take python3.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    del environment["PYTHONPATH"]
    return subprocess.run(
        [shutil.which("dash") or "sh", str(REPO / "finetune" / name), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "my conversations.jsonl"
    path.write_text(json.dumps(CONVERSATION) + "\n", encoding="utf-8")
    return path


@EACH
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_the_options_and_the_defaults(name: str, flag: str, tmp_path: Path) -> None:
    result = launch(name, flag, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: ")
    rate = {FULL: "--learning_rate 1e-5"}.get(name, "--learning_rate 3e-4")
    for text in ("-m, --model", "-d, --data", "-o, --output", "-h, --help", "(default: output_qwen)", rate):
        assert text in result.stdout
    assert ("--use_lora" in result.stdout) == (name != FULL)
    assert ("--q_lora" in result.stdout) == (name == QLORA)


@EACH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "x", "-x"], "unknown option '-x'"),
        (["-m", "x", "-d", "y", "--learning_rate", "1"], "unknown option '--learning_rate'"),
        (["x"], "unknown option 'x'"),
        (["-m"], "-m needs a value"),
        (["--model", "x", "--data", "-o"], "--data needs a value"),
        (["-m", "x", "-o", ""], "-o needs a value"),
    ],
)
def test_a_wrong_option_is_one_line(name: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    result = launch(name, *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{name}: error: {message}")
    assert result.stderr.count("\n") == 1


@EACH
@pytest.mark.parametrize("arguments", [[], ["-m", "x"], ["-d", "y", "-o", "z"]])
def test_model_and_data_are_needed(name: str, arguments: list[str], tmp_path: Path) -> None:
    result = launch(name, *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: ") and "-m MODEL -d DATA" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "no such file.json"], "finetune.py: error: --data_path no such file.json: "),
        (["-d", "my conversations.jsonl", "--", "--no_such_flag", "1"], "--no_such_flag"),
    ],
)
def test_faults_behind_the_launcher_are_the_commands(
    arguments: list[str], message: str, data: Path, tmp_path: Path
) -> None:
    result = launch(LORA, "-m", str(SMALL / "tiny-qwen-small"), *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [data.name]


@pytest.mark.parametrize(
    ("name", "defaults", "weights"),
    [
        (
            LORA,
            {
                "use_lora": True,
                "learning_rate": 3e-4,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 8,
            },
            "adapter_model.safetensors",
        ),
        (
            FULL,
            {
                "use_lora": False,
                "learning_rate": 1e-5,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 16,
            },
            "model.safetensors",
        ),
        (QLORA, {"use_lora": True, "q_lora": True, "learning_rate": 3e-4}, "adapter_model.safetensors"),
    ],
)
def test_a_run_from_any_folder(
    name: str, defaults: dict[str, object], weights: str, data: Path, tmp_path: Path
) -> None:
    """Paths are those of the current folder, names may hold spaces, what stands after ``--`` wins."""
    output = "my output"
    overrides = ["--num_train_epochs", "1", "--model_max_length", "64", "--system_message", "Two words"]
    result = launch(
        name, "-m", str(SMALL / "tiny-qwen-small"), "-d", data.name, "-o", output, "--", *overrides, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / output / weights).is_file()
    arguments = json.loads((tmp_path / output / "run_args.json").read_text(encoding="utf-8"))
    expected = {
        "num_train_epochs": 1,
        "model_max_length": 64,
        "system_message": "Two words",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "warmup_steps": 0.01,
        "lr_scheduler_type": "cosine",
        "save_steps": 1000,
        "save_total_limit": 10,
        "logging_steps": 1,
        "report_to": "none",
        "lazy_preprocess": True,
        "gradient_checkpointing": True,
        # There is no GPU here, so no precision is chosen.
        "bf16": False,
        "fp16": False,
        **defaults,
    }
    assert {key: arguments[key] for key in expected} == expected


def launch_with_stub(stub: str, *arguments: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run the LoRA launcher in a checkout without .venv where python3 is a shell script: no GPU is here to be asked."""
    shutil.copytree(REPO / "finetune", tmp_path / "repo" / "finetune")
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\n{stub}\n", encoding="utf-8")
    python.chmod(0o755)
    return subprocess.run(
        [shutil.which("dash") or "sh", str(tmp_path / "repo" / "finetune" / LORA), "-m", "M", "-d", "D", *arguments],
        env={"PATH": f"{python.parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


# Answers the launcher's question (-c) like a GPU with bf16, and shows what it is asked to run.
GPU_STUB = (
    """if [ "$1" = -c ]; then echo "--bf16 True"; else echo "gpu $CUDA_VISIBLE_DEVICES"; printf '%s\\n' "$@"; fi"""
)


def test_the_precision_of_the_gpu_is_used(tmp_path: Path) -> None:
    result = launch_with_stub(GPU_STUB, "--", "--seed", "7", tmp_path=tmp_path)
    lines = result.stdout.splitlines()
    assert lines[:2] == ["gpu 0", str(tmp_path / "repo" / "finetune.py")]
    assert lines[2:8] == ["--model_name_or_path", "M", "--data_path", "D", "--output_dir", "output_qwen"]
    assert lines[-4:] == ["--bf16", "True", "--seed", "7"]


def test_a_precision_of_the_users_is_left_alone(tmp_path: Path) -> None:
    result = launch_with_stub(GPU_STUB, "--", "--fp16", "True", tmp_path=tmp_path)
    assert result.stdout.splitlines()[-2:] == ["--fp16", "True"]
    assert "--bf16" not in result.stdout


def test_a_python_without_torch_is_named(tmp_path: Path) -> None:
    result = launch_with_stub("exit 1", tmp_path=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"{LORA}: error: python3 cannot import torch. Make an environment: sh {tmp_path}/repo/scripts/setup_env.sh\n"
    )
