"""Running the commands of this repository: as processes, or inside the test process with access to the run."""

from __future__ import annotations

import json
import logging
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import run_command
from tests import fork_server
from tests.golden import REPO
from training.callbacks import RunLog
from training.progress import Progress

TIMEOUT = 300

# For runs of a few steps: transformers' own defaults instead of this toolkit's. Later flags take precedence.
PLAIN = (
    "--num_train_epochs", "3", "--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "8",
    "--gradient_accumulation_steps", "1", "--learning_rate", "5e-5", "--lr_scheduler_type", "linear",
    "--warmup_steps", "0", "--weight_decay", "0", "--adam_beta2", "0.999", "--gradient_checkpointing", "False",
)  # fmt: skip


def environment() -> dict[str, str]:
    """Return the environment of commands. torchrun starts its ranks with ``PYTHON_EXEC``."""
    return {**fork_server.environment(), "PYTHON_EXEC": fork_server.python()}


def run(*arguments: object, timeout: float = TIMEOUT, is_new: bool = False) -> subprocess.CompletedProcess[str]:
    """Run ``python <arguments>`` in the repository's root; the caller checks the exit code.

    Args:
        is_new: start a new process, because its start matters; otherwise ``tests.fork_server`` forks one.
    """
    return subprocess.run(
        [sys.executable if is_new else fork_server.python(), *map(str, arguments)],
        cwd=REPO, env=environment(), capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def run_well(*arguments: object, timeout: float = TIMEOUT, is_new: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command that must exit with code 0."""
    result = run(*arguments, timeout=timeout, is_new=is_new)
    assert result.returncode == 0, f"{arguments}\n{result.stderr}"
    return result


def run_all(commands: Sequence[Sequence[object]], is_new: bool = False) -> list[subprocess.CompletedProcess[str]]:
    """Run several commands, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda arguments: run(*arguments, is_new=is_new), commands))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Recorder(RunLog):
    """A run log that also records the gradients of every optimizer step, by parameter name."""

    def __init__(self, folder: str | Path, progress: Progress, resumes: bool = False) -> None:
        super().__init__(folder, progress, resumes)
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.model: Any = None  # after training
        self.trainer_state: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self.model, self.trainer_state = kwargs["model"], state


@contextmanager
def restored_log_handlers() -> Iterator[None]:
    """Restore pytest's log handlers after a command, which replaces them."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    try:
        yield
    finally:
        root.handlers[:] = handlers


def finetune_here(*arguments: object) -> Recorder:
    """Run ``finetune.py`` in this process, with ``PLAIN`` unless a config is given, and return its recorded log."""
    import finetune

    recorders: list[Recorder] = []

    def record(folder: str | Path, progress: Progress, resumes: bool = False) -> Recorder:
        recorders.append(Recorder(folder, progress, resumes))
        return recorders[-1]

    with pytest.MonkeyPatch.context() as patch, fork_server.restored_environment(), restored_log_handlers():
        patch.setattr("training.build.RunLog", record)
        plain = () if "--config" in arguments else PLAIN
        finetune.main([*plain, *map(str, arguments), "--disable_tqdm", "True", "--use_cpu", "True"])
    [recorder] = recorders
    return recorder


@contextmanager
def limited_file_size(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size`` bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run_here(main: Callable[[Sequence[str]], int | None], name: str, arguments: Sequence[object]) -> int:
    """Run a command's ``main`` through ``run_command`` in this process, and return the exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr("sys.argv", [name, *map(str, arguments)])
        with fork_server.restored_environment(), restored_log_handlers():
            run_command(main, name)
    return int(exit_.value.code or 0)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_log(output: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ``training_log.jsonl``."""
    return [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]


def logged_losses(output: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in read_log(output) if name in row]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
