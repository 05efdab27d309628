"""Interrupted runs leave complete checkpoints, report how they resume, and resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import finetune
from tests import fork_server
from tests.commands import (
    PLAIN,
    environment,
    finetune_here,
    free_port,
    limited_file_size,
    logged_losses,
    names_in,
    read_json,
    run,
    run_here,
    run_well,
)
from tests.golden import REPO
from tests.models import TINY, write_conversations
from training.run_folder.curves import load_rows
from training.run_folder.manifest import checkpoints_in, step_of

MODEL = [
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "qwen.tiktoken",
    "tokenizer_config.json",
]  # fmt: skip
CHECKPOINT = sorted([*MODEL, "manifest.json", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"])


def arguments(folder: Path, max_steps: int, *flags: object) -> list[object]:
    data = write_conversations(folder / "train.json")
    return [
        *PLAIN, "--model_name_or_path", TINY, "--data_path", data, "--output_dir", folder / "out", "--max_steps",
        max_steps, "--per_device_train_batch_size", 2, "--save_strategy", "steps", "--save_steps", 2,
        "--logging_steps", 1, "--lr_scheduler_type", "constant", *flags,
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def message(stderr: str) -> str:
    assert "Traceback" not in stderr, stderr
    return stderr.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize(
    ("limit", "folder", "reason"),
    [
        (100_000, "checkpoint-4", "File too large"),
        (400_000, "", "torch.save could not write all of a file"),
    ],
    ids=["weights", "optimizer"],
)
def test_a_full_disk_during_a_checkpoint_leaves_the_earlier_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], limit: int, folder: str, reason: str
) -> None:
    output = tmp_path / "out"
    finetune_here(*arguments(tmp_path, 2))
    before = contents(output)
    resume = ["--resume_from_checkpoint", "True"]
    with limited_file_size(limit):
        assert run_here(finetune.main, "finetune.py", arguments(tmp_path, 6, *resume)) == 1
    assert message(capfd.readouterr().err) == (
        f"finetune.py: error: cannot save to {output / folder} ({reason}). Free some space there; what was saved "
        "before is unchanged. The same command with "
        f"--resume_from_checkpoint {output / 'checkpoint-2'} resumes from there"
    )
    # The records of the resumed run, which has not finished, have replaced those of the first.
    changed = ("training_log.jsonl", "data_receipt.json", "data_receipt.html", "run_args.json", "run_summary.json")
    assert "run_summary.json" not in names_in(output)
    assert {name: content for name, content in contents(output).items() if name not in changed} == {
        name: content for name, content in before.items() if name not in changed
    }
    finetune_here(*arguments(tmp_path, 6, *resume))
    assert names_in(output / "checkpoint-6") == CHECKPOINT
    assert len(logged_losses(output)) == 6


def test_a_full_disk_at_the_end_saves_no_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with limited_file_size(100_000):
        code = run_here(finetune.main, "finetune.py", arguments(tmp_path, 2, "--save_strategy", "no"))
    output = tmp_path / "out"
    assert code == 1
    error = message(capfd.readouterr().err)
    assert error.startswith(f"finetune.py: error: cannot save to {output} (File too large). ")
    assert error.endswith("No checkpoint was saved: the same command with --overwrite_output_dir starts over")
    records = ["data_receipt.html", "data_receipt.json", "run_args.json", "training_log.jsonl", "training_samples.json"]
    assert names_in(output) == records
    finetune_here(*arguments(tmp_path, 2, "--save_strategy", "no", "--overwrite_output_dir"))
    assert set(MODEL) < set(names_in(output))


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGTERM, 143, "terminated"),
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.long),
    ],
)
def test_a_stopped_run_saves_a_checkpoint_first(tmp_path: Path, number: signal.Signals, code: int, word: str) -> None:
    """It saves after the current step, long before the next checkpoint is due; SIGUSR1 only saves."""
    output = tmp_path / "out"
    flags = ["--save_steps", 1000, "--resume_from_checkpoint", "auto"]
    with running(tmp_path, ["finetune.py"], arguments(tmp_path, 100_000, *flags)) as process:
        wait_for(process, tmp_path, lambda: len(logged(output)) > 3)
        process.send_signal(signal.SIGUSR1)
        wait_for(process, tmp_path, lambda: len(saved(output)) == 1)
        requested = saved(output)[0]
        wait_for(process, tmp_path, lambda: logged(output)[-1] > requested)
        process.send_signal(number)
        assert process.wait(60) == code
    assert saved(output)[:-1] == [requested]
    newest = output / f"checkpoint-{saved(output)[-1]}"
    assert logged(output)[-1] == saved(output)[-1]  # no step is lost
    assert all(names_in(output / f"checkpoint-{step}") == CHECKPOINT for step in saved(output))
    assert not {*MODEL, ".saving"} & set(names_in(output))
    stderr = (tmp_path / "stderr").read_text()
    assert message(stderr) == f"finetune.py: {word}. The same command resumes from {newest}"
    assert f"{number.name}: finishing the current step and saving a checkpoint, then ending" in stderr
    resume = arguments(tmp_path, saved(output)[-1] + 2, *flags)
    assert run_here(finetune.main, "finetune.py", resume) == 0
    assert logged(output) == list(range(1, saved(output)[-1] + 1))


def logged(output: Path) -> list[int]:
    """Return the steps in the log, without a row that is being written."""
    log = output / "training_log.jsonl"
    return [row["step"] for row in load_rows(log)] if log.is_file() else []


def saved(output: Path) -> list[int]:
    return [step_of(path) for path in reversed(checkpoints_in(output))]


@contextmanager
def running(
    folder: Path, launcher: Sequence[object], words: Sequence[object], is_new: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Run a command in the background, with stderr in a file of the folder; a new process has its own children."""
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable if is_new else fork_server.python(), *map(str, [*launcher, *words])],
            cwd=REPO, env=environment(), stdout=stderr, stderr=stderr, text=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(process: subprocess.Popen[str], folder: Path, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "stderr").read_text()
        time.sleep(0.01)


# Kills the process in the middle of the second checkpoint, like the loss of its machine.
KILLED = """
import os, signal, sys
import finetune
from transformers import Trainer
save = Trainer._save_rng_state
def die(self, folder):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)
Trainer._save_rng_state = die
finetune.main(sys.argv[1:])
"""


def test_a_process_killed_while_it_saves_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    result = run("-c", KILLED, *arguments(tmp_path, 6))
    assert result.returncode == -9, result.stderr
    output = tmp_path / "out"
    assert [name for name in names_in(output) if name.startswith("checkpoint-")] == ["checkpoint-2"]
    assert names_in(output / "checkpoint-2") == CHECKPOINT
    assert run_here(finetune.main, "finetune.py", arguments(tmp_path, 6, "--resume_from_checkpoint", "True")) == 0
    assert [name for name in names_in(output) if "-" in name or name == ".saving"] == [
        "checkpoint-2", "checkpoint-4", "checkpoint-6"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the checkpoints


def test_save_total_limit_keeps_the_best_checkpoint(tmp_path: Path) -> None:
    """Staging does not change transformers' bookkeeping of checkpoints."""
    best = ["--eval_data_path", tmp_path / "train.json", "--eval_strategy", "steps", "--eval_steps", 2,
            "--load_best_model_at_end", "--learning_rate", "0.003", "--save_total_limit", 2]  # fmt: skip
    finetune_here(*arguments(tmp_path, 8, *best))
    output = tmp_path / "out"
    checkpoints = [name for name in names_in(output) if name.startswith("checkpoint-")]
    assert len(checkpoints) == 2
    losses = {row: loss for row, loss in zip((2, 4, 6, 8), logged_losses(output, "eval_loss"), strict=True)}
    winner = min(losses, key=lambda step: losses[step])
    assert f"checkpoint-{winner}" in checkpoints
    for name in checkpoints:
        state = read_json(output / name / "trainer_state.json")
        assert Path(state["best_model_checkpoint"]).parent == output
    assert state["best_model_checkpoint"] == str(output / f"checkpoint-{winner}")
    assert (output / "model.safetensors").read_bytes() == (
        output / f"checkpoint-{winner}" / "model.safetensors"
    ).read_bytes()


def test_two_ranks_save_after_the_same_step(tmp_path: Path) -> None:
    """Only rank 1 gets the signal. Their last checkpoint is damaged afterwards; they resume from the one before."""
    output = tmp_path / "out"
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port"]
    flags = ["--save_steps", 4, "--resume_from_checkpoint", "auto"]
    words = arguments(tmp_path, 100_000, *flags)
    with running(tmp_path, [*torchrun, free_port(), "finetune.py"], words, is_new=True) as process:
        wait_for(process, tmp_path, lambda: len(logged(output)) > 5)
        [second] = [pid for pid in children_of(process.pid) if rank_of(pid) == 1]
        os.kill(second, signal.SIGTERM)
        assert process.wait(60) != 0
    expected = sorted({*CHECKPOINT, "rng_state_0.pth", "rng_state_1.pth"} - {"rng_state.pth"})
    first, *_, last = saved(output)
    assert (first, last) == (4, logged(output)[-1])
    assert names_in(output / f"checkpoint-{last}") == expected
    stderr = (tmp_path / "stderr").read_text()
    assert (
        stderr.count(f"finetune.py: terminated. The same command resumes from {output / f'checkpoint-{last}'}\n") == 1
    )

    state = output / f"checkpoint-{last}" / "rng_state_1.pth"
    state.write_bytes(state.read_bytes()[:-1])
    before = saved(output)[-2]
    words[words.index("--max_steps") + 1] = before + 1
    result = run_well(*torchrun, free_port(), "finetune.py", *words)
    assert f"checkpoint-{last} is incomplete or damaged and is skipped: rng_state_1.pth has" in result.stderr
    assert result.stderr.count(f"Resuming from {output / f'checkpoint-{before}'}") == 1
    assert saved(output)[-1] == before + 1  # the damaged one, of a later step, was removed
    assert logged(output) == list(range(1, before + 2))
    assert ".saving" not in names_in(output)


def children_of(parent: int) -> list[int]:
    """Return the child processes of a process."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=True)
    return [int(word) for word in listed.stdout.split()]


def rank_of(process: int) -> int:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return int(next(each for each in variables if each.startswith(b"RANK=")).removeprefix(b"RANK="))
