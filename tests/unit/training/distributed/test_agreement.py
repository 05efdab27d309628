"""Ranks with different inputs are reported before training starts, and so are ranks that cannot connect."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from errors import ConfigError, RunError
from loading.checkpoint import load_checkpoint
from tests import fork_server
from tests.commands import free_port
from tests.golden import REPO
from tests.models import TINY, copy_checkpoint, write_conversations
from tests.worlds import run_on_ranks
from training.config.args import RunArguments
from training.config.parsing import parse_args
from training.distributed import agreement
from training.distributed.agreement import check_agreement
from training.distributed.launch import connection_errors
from training.distributed.world import World


def arguments(folder: Path, *more: object) -> RunArguments:
    data = folder / "train.json"
    words = [
        "--model_name_or_path",
        TINY,
        "--data_path",
        data,
        "--output_dir",
        folder / "out",
        "--use_cpu",
        "True",
        *more,
    ]
    return parse_args([str(word) for word in words])


def differences(commands: list[RunArguments], hosts: list[str]) -> str | None:
    """Return the error message of ``check_agreement``, which must be the same on all ranks."""

    def work(world: World) -> None:
        args = commands[world.rank]
        check_agreement(world, args, load_checkpoint(args.model.model_name_or_path), "cpu")

    errors = run_on_ranks(len(commands), work, hosts)
    assert len({str(error) for error in errors}) == 1
    if errors[0] is None:
        return None
    assert all(isinstance(error, ConfigError) and error.is_shared for error in errors)
    return str(errors[0])


def test_same_command_agrees(tmp_path: Path) -> None:
    assert differences([arguments(tmp_path, "--learning_rate", "3e-4") for _ in range(3)], ["a", "a", "b"]) is None


def test_paths_and_per_process_flags_may_differ(tmp_path: Path) -> None:
    """The same weights in another folder, and flags that a launcher sets for each process."""
    model = shutil.copytree(TINY, tmp_path / "copy")
    other = arguments(tmp_path, "--model_name_or_path", model, "--local_rank", 1, "--logging_dir", "x", "--debug")
    assert differences([arguments(tmp_path), other], ["a", "b"]) is None


def test_one_differing_argument_is_reported(tmp_path: Path) -> None:
    commands = [arguments(tmp_path, "--learning_rate", rate) for rate in ("3e-4", "1e-4", "1e-4")]
    assert differences(commands, ["a", "b", "b"]) == (
        "rank 1 (b) and 1 more: --learning_rate 0.0001, rank 0 (a): 0.0003. "
        "Start all processes with the same command and the same installation"
    )


def test_all_differences_are_reported(tmp_path: Path) -> None:
    """A differing model is reported by the fingerprints of its weights and its config."""
    from safetensors.torch import load_file, save_file

    model = copy_checkpoint(tmp_path / "copy", rope_theta=5000)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    commands = [arguments(tmp_path), arguments(tmp_path, "--model_name_or_path", model, "--seed", 7, "--dry_run")]
    message = differences(commands, ["a", "b"])
    assert message is not None
    title, *lines = message.splitlines()
    assert title == "the processes of this run differ in 4 ways:"
    assert lines[0] == "  1. rank 1 (b): --seed 7, rank 0 (a): 42"
    assert lines[1] == "  2. rank 1 (b): --dry_run true, rank 0 (a): false"
    assert lines[2].startswith("  3. rank 1 (b): weights of --model_name_or_path ")
    assert lines[3].startswith("  4. rank 1 (b): config of --model_name_or_path ")
    assert lines[4] == "  Start all processes with the same command and the same installation"


def test_config_file_is_compared_by_content(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.json", "same.json", "other.json")]
    for file in files:
        file.write_text(json.dumps({"zero_optimization": {"stage": 3 if file.stem == "other" else 2}}))
    write_conversations(tmp_path / "train.json")
    one, same, other = (agreement._host_inputs(arguments(tmp_path, "--deepspeed", file), load(TINY)) for file in files)
    assert one == same
    assert {name for name in one if one[name] != other[name]} == {"content of --deepspeed"}


def load(folder: Path) -> Any:
    return load_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("name", "value"),
    [("torch", "1.0"), ("deepspeed", "0.1"), ("python", "3.8"), ("NCCL_ALGO", "Tree"), ("device", "cuda")],
)
def test_differing_installation_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """One interpreter has one installation, so the inputs of the second rank are changed."""
    real, calls = agreement._process_inputs, iter([False, True])
    monkeypatch.setattr(
        agreement, "_process_inputs", lambda *given: real(*given) | ({name: value} if next(calls) else {})
    )
    args = arguments(tmp_path)
    expected = real(args, "cpu")[name]
    errors = run_on_ranks(2, lambda world: check_agreement(world, args, load(TINY), "cpu"))
    message = str(errors[0])
    assert message.startswith(("rank 0: ", "rank 1: ")) and name in message
    shown = "(none)" if expected is None else expected
    assert value in message and shown in message


def test_digest_of_sources_changes_with_python_files_only(tmp_path: Path) -> None:
    for name in ("errors.py", "training/loop.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    before = agreement.digest_sources(tmp_path)
    assert agreement.digest_sources(tmp_path) == before
    (tmp_path / "notes.txt").write_text("no source")
    assert agreement.digest_sources(tmp_path) == before
    (tmp_path / "training/loop.py").write_text("x = 2\n")
    assert agreement.digest_sources(tmp_path) != before
    assert len(agreement.digest_sources(REPO)) == 64


# -------------------------------------------------------------------------------------------------------- connecting

CONNECT = """
from datetime import timedelta
import torch.distributed as dist
from training.distributed.launch import connection_errors
with connection_errors():
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))
"""


def connect(**environment: object) -> str:
    """Return the last line of a process that tries to connect to the others."""
    environment = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **environment}
    done = subprocess.run(
        [fork_server.python(), "-c", CONNECT], cwd=REPO, capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
    )  # fmt: skip
    return done.stderr.splitlines()[-1]


def test_port_in_use_is_reported() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        line = connect(MASTER_PORT=port)
    assert line == f"errors.ConfigError: MASTER_PORT={port} is in use on this host. " + (
        "Use another one, such as 29501, on all hosts"
    )


def test_unreachable_rank_0_is_reported() -> None:
    port = free_port()
    line = connect(RANK=1, MASTER_PORT=port)
    assert line.startswith(f"errors.RunError: rank 0 cannot be reached at MASTER_ADDR=127.0.0.1 MASTER_PORT={port} (")


def test_missing_ranks_are_reported() -> None:
    assert "RunError: only some of the 2 processes connected to MASTER_ADDR=127.0.0.1" in connect()


def test_other_errors_are_unchanged() -> None:
    with pytest.raises(RuntimeError, match=r"^a bug$"), connection_errors():
        raise RuntimeError("a bug")
    with pytest.raises(RunError, match="the processes cannot connect to each other"), connection_errors():
        raise RuntimeError("Gloo connectFullMesh failed with no route")
