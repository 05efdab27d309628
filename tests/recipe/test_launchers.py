"""The launchers in finetune/ under a POSIX shell: options, errors, and the arguments that reach finetune.py."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import free_port
from tests.golden import REPO, SMALL, offline_environment
from training.checks import check_args
from training.config.parsing import parse_args

LORA = "finetune_lora_single_gpu.sh"
FULL = "finetune_single_gpu.sh"
QLORA = "finetune_qlora_single_gpu.sh"
FULL_DS, LORA_DS, QLORA_DS, FSDP = "finetune_ds.sh", "finetune_lora_ds.sh", "finetune_qlora_ds.sh", "finetune_fsdp.sh"
MANY = [FULL_DS, LORA_DS, QLORA_DS, FSDP]
EACH = pytest.mark.parametrize("name", [LORA, FULL, QLORA, *MANY])

CONVERSATION = {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}]}


def launch(name: str, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher from ``cwd`` without a GPU, under dash if it is installed."""
    environment = {**offline_environment(), "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "passive", **variables}
    # In a checkout without .venv the launchers use python3.
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
def test_help_lists_options_and_defaults(name: str, flag: str, tmp_path: Path) -> None:
    result = launch(name, flag, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: ")
    full = name in (FULL, FULL_DS, FSDP)
    texts = ["-m, --model", "-d, --data", "-o, --output", "-h, --help", "(default: output_qwen)"]
    defaults = ["--model_max_length 2048", "--learning_rate 1e-05" if full else "--learning_rate 0.0003"]
    for text in (*texts, *defaults, "--preview", "--resume_from_checkpoint auto"):
        assert text in result.stdout
    assert ("--use_lora" in result.stdout) == (not full)
    assert ("--q_lora" in result.stdout) == (name in (QLORA, QLORA_DS))
    engine = {
        FULL_DS: "--deepspeed ds_config_zero3.json",
        LORA_DS: "--deepspeed ds_config_zero2.json",
        FSDP: "--fsdp_config fsdp_config.json",
    }.get(name, "")
    if engine:
        flag, file = engine.split()
        assert f"{flag} {REPO / 'finetune' / file}\n" in result.stdout
    assert ("--deepspeed" in result.stdout) == engine.startswith("--deepspeed")
    variables = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GPUS_PER_NODE", "NPROC", "MAX_RESTARTS")
    assert [variable in result.stdout for variable in variables] == [name in MANY] * len(variables)


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
def test_wrong_option_is_one_line(name: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    result = launch(name, *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{name}: error: {message}")
    assert result.stderr.count("\n") == 1


@EACH
@pytest.mark.parametrize(
    ("arguments", "missing"), [([], "-m MODEL"), (["-m", "x"], "-d DATA"), (["-d", "y", "-o", "z"], "-m MODEL")]
)
def test_model_and_data_are_required(name: str, arguments: list[str], missing: str, tmp_path: Path) -> None:
    result = launch(name, *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{name}: error: {missing} is missing. Usage: ")
    assert "-m MODEL -d DATA" in result.stderr
    assert result.stderr.count("\n") == 1


def test_control_characters_of_a_name_do_not_reach_the_terminal(tmp_path: Path) -> None:
    result = launch(LORA, "--x\x1b[31m\nforged: line", cwd=tmp_path)
    assert result.returncode == 2
    assert "\x1b" not in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "no such file.json"], "finetune.py: error: --data_path no such file.json: "),
        (["-d", "my conversations.jsonl", "--", "--no_such_flag", "1"], "--no_such_flag"),
    ],
)
def test_errors_of_finetune_are_shown_unchanged(arguments: list[str], message: str, data: Path, tmp_path: Path) -> None:
    result = launch(LORA, "-m", str(SMALL / "tiny-qwen-small"), *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [data.name]


COMMON = {
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "warmup_steps": 0.01,
    "lr_scheduler_type": "cosine",
    "save_steps": 1000,
    "save_total_limit": 10,
    "report_to": "none",
    "gradient_checkpointing": True,
    "num_train_epochs": 5,
    "per_device_eval_batch_size": 1,
    "model_max_length": 2048,
    "resume_from_checkpoint": None,  # auto, which is not recorded
    # Without a GPU no precision is added.
    "bf16": False,
    "fp16": False,
}
FULL_MODE = {
    "use_lora": False, "learning_rate": 1e-5, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16,
}  # fmt: skip
LORA_MODE = {
    "use_lora": True, "learning_rate": 3e-4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8,
}  # fmt: skip
OVERRIDES = {"num_train_epochs": 1, "model_max_length": 64, "system_message": "Two words"}
OVERRIDING_ARGUMENTS = ["--num_train_epochs", "1", "--model_max_length", "64", "--system_message", "Two words"]


@pytest.mark.parametrize(
    ("name", "mode", "weights"),
    [(LORA, LORA_MODE, "adapter_model.safetensors"), (FULL_DS, FULL_MODE, "model.safetensors")],
)
def test_run_from_any_folder(name: str, mode: dict[str, object], weights: str, data: Path, tmp_path: Path) -> None:
    """Paths are relative to the current folder, names may contain spaces, arguments after ``--`` override defaults.

    The launcher for several GPUs runs two processes here.
    """
    output = "my output"
    command = [name, "-m", str(SMALL / "tiny-qwen-small"), "-d", data.name, "-o", output, "--", *OVERRIDING_ARGUMENTS]
    result = launch(*command, cwd=tmp_path, NPROC="2")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / output / weights).is_file()
    arguments = json.loads((tmp_path / output / "run_args.json").read_text(encoding="utf-8"))
    expected = COMMON | OVERRIDES | mode
    assert {key: arguments[key] for key in expected} == expected
    assert f" of {32 if name in MANY else 16} samples (" in result.stderr  # batch size x accumulation x processes


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (LORA, LORA_MODE | {"q_lora": False, "deepspeed": None}),
        (FULL, FULL_MODE | {"deepspeed": None}),
        (QLORA, LORA_MODE | {"q_lora": True}),
        (FULL_DS, FULL_MODE | {"deepspeed": "ds_config_zero3.json"}),
        (LORA_DS, LORA_MODE | {"deepspeed": "ds_config_zero2.json", "q_lora": False}),
        (QLORA_DS, LORA_MODE | {"q_lora": True, "deepspeed": None}),
        (FSDP, FULL_MODE | {"deepspeed": None, "fsdp_config": "fsdp_config.json"}),
    ],
)
def test_finetune_accepts_the_arguments_of_each_mode(
    name: str, mode: dict[str, object], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = """if [ "$1" = -c ]; then echo "0 2 "; else printf '%s\\n' "$@"; fi"""
    options = ["-m", str(SMALL / "tiny-qwen-small"), "-d", str(data), "-o", str(tmp_path / "output")]
    result = launch_with_stub(show, *options, "--", *OVERRIDING_ARGUMENTS, tmp_path=tmp_path, name=name, NPROC="2")
    assert result.returncode == 0, result.stderr
    command = result.stdout.splitlines()
    argv = command[command.index(str(tmp_path / "repo" / "finetune.py")) + 1 :]
    if name in MANY:
        monkeypatch.setenv("WORLD_SIZE", "2")
    for words, overrides in ((argv, OVERRIDES), (argv[: -len(OVERRIDING_ARGUMENTS)], {})):
        args = parse_args(words)
        check_args(args)
        assert args.resumes_automatically
        arguments = json.loads(json.dumps(args.to_dict()))
        for flag in ("deepspeed", "fsdp_config"):
            arguments[flag] = arguments[flag] and Path(arguments[flag]).name
        expected = COMMON | mode | overrides
        assert {key: arguments[key] for key in expected} == expected


def test_preview_shows_the_run_of_the_launcher(data: Path, tmp_path: Path) -> None:
    """In the folder of the data there is a module with a name of this checkout's, which must not be imported."""
    (tmp_path / "console.py").write_text("raise SystemExit(9)")
    model = str(SMALL / "tiny-qwen-small")
    result = launch(
        FULL_DS, "-m", model, "-d", data.name, "--preview", "--", "--json", "report.json", cwd=tmp_path, NPROC="3"
    )
    assert result.returncode == 0, result.stderr
    assert "Sample 1 of 1" in result.stdout
    settings = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["train"]["settings"]
    expected = {"model_max_length": 2048, "batch_size": 1, "accumulation": 16, "world_size": 3, "epochs": 5}
    assert {name: settings[name] for name in expected} == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["console.py", data.name, "report.json"]


def launch_with_stub(
    stub: str, *arguments: str, tmp_path: Path, name: str = LORA, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a launcher in a checkout without .venv, with a shell script as python3 that simulates a host with GPUs."""
    shutil.copytree(REPO / "finetune", tmp_path / "repo" / "finetune")
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\n{stub}\n", encoding="utf-8")
    python.chmod(0o755)
    return subprocess.run(
        [shutil.which("dash") or "sh", str(tmp_path / "repo" / "finetune" / name), *arguments],
        env={"PATH": f"{python.parent}:/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


M_AND_D = ["-m", "M", "-d", "D"]
# Answers the launcher's query (-c) like a host with 4 GPUs and bf16, and prints the command it is asked to run.
SHOW = """echo "gpu $CUDA_VISIBLE_DEVICES, threads $OMP_NUM_THREADS, gloo $GLOO_SOCKET_IFNAME"; printf '%s\\n' "$@";"""
GPU_STUB = f"""if [ "$1" = -c ]; then echo "4 16 --bf16 True"; else {SHOW} fi"""
# Answers the query with the real Python of this machine.
HERE_STUB = f"""if [ "$1" = -c ]; then exec "{sys.executable}" "$@"; else {SHOW} fi"""


def test_precision_of_the_gpu_is_added(tmp_path: Path) -> None:
    result = launch_with_stub(GPU_STUB, *M_AND_D, "--", "--seed", "7", tmp_path=tmp_path)
    lines = result.stdout.splitlines()
    assert lines[:2] == ["gpu 0, threads , gloo ", str(tmp_path / "repo" / "finetune.py")]
    assert lines[2:8] == ["--model_name_or_path", "M", "--data_path", "D", "--output_dir", "output_qwen"]
    assert lines[-4:] == ["--bf16", "True", "--seed", "7"]


def test_precision_given_by_the_user_is_kept(tmp_path: Path) -> None:
    result = launch_with_stub(GPU_STUB, *M_AND_D, "--", "--fp16", "True", tmp_path=tmp_path)
    assert result.stdout.splitlines()[-2:] == ["--fp16", "True"]
    assert "--bf16" not in result.stdout


def torchrun_options(lines: list[str]) -> dict[str, str]:
    """Return the options of torchrun in the command that a stub printed."""
    assert lines[1].endswith("/training/distributed/torchrun.py")
    end = next(number for number, line in enumerate(lines) if line.endswith("/finetune.py"))
    assert lines[end + 1 : end + 3] == ["--model_name_or_path", "M"]
    return dict(zip(lines[2:end:2], lines[3:end:2], strict=True))


@pytest.mark.parametrize(
    ("variables", "processes", "threads"),
    [
        ({}, "4", "4"),
        ({"NPROC": "2"}, "4", "4"),  # only for machines without a GPU
        ({"GPUS_PER_NODE": "3"}, "3", "5"),
        ({"OMP_NUM_THREADS": "7"}, "4", "7"),
    ],
)
def test_one_process_per_gpu(variables: dict[str, str], processes: str, threads: str, tmp_path: Path) -> None:
    result = launch_with_stub(GPU_STUB, *M_AND_D, "--", "--seed", "7", tmp_path=tmp_path, name=LORA_DS, **variables)
    lines = result.stdout.splitlines()
    assert lines[0] == f"gpu , threads {threads}, gloo "  # CUDA_VISIBLE_DEVICES is not set
    options = torchrun_options(lines)
    assert (options["--nnodes"], options["--nproc_per_node"], options["--max_restarts"]) == ("1", processes, "0")
    assert options["--rdzv_endpoint"] == "localhost:0"
    assert lines[lines.index("--deepspeed") + 1] == f"{tmp_path}/repo/finetune/ds_config_zero2.json"
    assert lines[-4:] == ["--bf16", "True", "--seed", "7"]


def test_hosts_meet_at_the_address_of_host_0(tmp_path: Path) -> None:
    """The loopback interface plays the network between two hosts."""
    variables = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "MAX_RESTARTS": "3"}
    for rank in ("0", "1"):
        result = launch_with_stub(
            HERE_STUB,
            *M_AND_D,
            tmp_path=tmp_path / rank,
            name=FULL_DS,
            CUDA_VISIBLE_DEVICES="",
            NODE_RANK=rank,
            **variables,
        )
        lines = result.stdout.splitlines()
        if sys.platform == "linux":
            assert lines[0].endswith(", gloo lo")
        assert torchrun_options(lines) == {
            "--nnodes": "2",
            "--nproc_per_node": "1",
            "--max_restarts": "3",
            "--rdzv_backend": "c10d",
            "--rdzv_endpoint": f"127.0.0.1:{variables['MASTER_PORT']}",
            "--rdzv_id": f"qwen-{variables['MASTER_PORT']}",
            "--rdzv_conf": f"is_host={1 - int(rank)}",
            "--local_addr": "127.0.0.1",
        }


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "two"}, "NNODES=two is not possible. Give a whole number from 1"),
        ({"NNODES": "0"}, "NNODES=0 is not possible"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "10.0.0.1"}, "NNODES=2 needs NODE_RANK"),
        (
            {"NNODES": "2", "MASTER_ADDR": "x", "NODE_RANK": "2"},
            "NODE_RANK=2 is not possible. Give a whole number from 0 to 1",
        ),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 is not possible"),
        (
            {"NNODES": "2", "MASTER_ADDR": "no host", "NODE_RANK": "1"},
            "MASTER_ADDR=no host cannot be resolved or reached",
        ),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not possible"),
        ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0 is not possible"),
        ({"NPROC": "1.5"}, "NPROC=1.5 is not possible"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1 is not possible"),
    ],
)
def test_wrong_variable_is_one_line(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    result = launch(LORA_DS, "-m", "x", "-d", "y", cwd=tmp_path, **variables)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{LORA_DS}: error: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("handler", "signals"), [(signal.SIG_IGN, "SIGTERM,SIGINT,SIGQUIT"), (signal.SIG_DFL, "")])
def test_nohup_applies_to_torchrun(handler: signal.Handlers, signals: str, tmp_path: Path) -> None:
    """torchrun handles SIGHUP, which nohup has had ignored, unless it is told not to."""
    stub = f"""if [ "$1" = -c ]; then exec "{sys.executable}" "$@"; else echo "[$PET_SIGNALS_TO_HANDLE]"; fi"""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        result = launch_with_stub(stub, *M_AND_D, tmp_path=tmp_path, name=LORA_DS, CUDA_VISIBLE_DEVICES="")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.stdout == f"[{signals}]\n"


def test_more_processes_than_gpus_are_refused(tmp_path: Path) -> None:
    result = launch_with_stub(GPU_STUB, *M_AND_D, tmp_path=tmp_path, name=FSDP, GPUS_PER_NODE="8")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"{FSDP}: error: GPUS_PER_NODE=8: this host has 4 visible GPUs\n"


def test_port_in_use_is_reported(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        result = launch(FULL_DS, "-m", "x", "-d", "y", cwd=tmp_path, MASTER_PORT=port)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{FULL_DS}: error: MASTER_PORT={port} cannot be opened")
    assert result.stderr.count("\n") == 1


def test_python_without_torch_is_reported(tmp_path: Path) -> None:
    result = launch_with_stub("exit 1", *M_AND_D, tmp_path=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"{LORA}: error: python3 cannot import torch. Make an environment: sh {tmp_path}/repo/scripts/setup_env.sh\n"
    )
