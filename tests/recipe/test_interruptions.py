"""A run that ends before its time leaves whole checkpoints, says how it goes on, and does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import finetune
from tests.commands import (
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

MODEL = ["config.json", "generation_config.json", "model.safetensors", "qwen.tiktoken", "tokenizer_config.json"]
CHECKPOINT = sorted([*MODEL, "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"])


def arguments(folder: Path, max_steps: int, *flags: object) -> list[object]:
    data = write_conversations(folder / "train.json")
    return [
        "--model_name_or_path", TINY, "--data_path", data, "--output_dir", folder / "out", "--max_steps", max_steps,
        "--per_device_train_batch_size", 2, "--save_strategy", "steps", "--save_steps", 2, "--logging_steps", 1,
        "--lr_scheduler_type", "constant", *flags,
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def message(stderr: str) -> str:
    assert "Traceback" not in stderr, stderr
    return stderr.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize(
    ("limit", "place", "reason"),
    [
        (100_000, "checkpoint-4", "File too large"),
        (400_000, "", "torch.save could not write all of a file"),
    ],
    ids=["weights", "optimizer"],
)
def test_a_disk_that_fills_up_while_a_checkpoint_is_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], limit: int, place: str, reason: str
) -> None:
    output = tmp_path / "out"
    finetune_here(*arguments(tmp_path, 2))
    before = contents(output)
    resume = ["--resume_from_checkpoint", "True"]
    with limited_file_size(limit):
        assert run_here(finetune.main, "finetune.py", arguments(tmp_path, 6, *resume)) == 1
    assert message(capfd.readouterr().err) == (
        f"finetune.py: error: cannot save to {output / place} ({reason}). Free some space there; what was saved before "
        f"is as it was. The same command with --resume_from_checkpoint {output / 'checkpoint-2'} goes on from there"
    )
    # The log goes on with the steps that were done, the receipt tells of the run at hand.
    changed = ("training_log.jsonl", "data_receipt.json", "data_receipt.html")
    assert {name: content for name, content in contents(output).items() if name not in changed} == {
        name: content for name, content in before.items() if name not in changed
    }
    finetune_here(*arguments(tmp_path, 6, *resume))
    assert names_in(output / "checkpoint-6") == CHECKPOINT
    assert len(logged_losses(output)) == 6


def test_a_disk_that_is_full_at_the_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with limited_file_size(100_000):
        code = run_here(finetune.main, "finetune.py", arguments(tmp_path, 2, "--save_strategy", "no"))
    output = tmp_path / "out"
    assert code == 1
    error = message(capfd.readouterr().err)
    assert error.startswith(f"finetune.py: error: cannot save to {output} (File too large). ")
    assert error.endswith("No checkpoint had been saved: the same command with --overwrite_output_dir starts anew")
    assert names_in(output) == ["data_receipt.html", "data_receipt.json", "training_log.jsonl", "training_loss.png"]
    finetune_here(*arguments(tmp_path, 2, "--save_strategy", "no", "--overwrite_output_dir"))
    assert set(MODEL) < set(names_in(output))


# -------------------------------------------------------------------------------------------------------------- signals


def test_interruptions_leave_checkpoints_that_go_on(tmp_path: Path) -> None:
    signals = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated"), signal.SIGKILL: (-9, None)}
    for number, (code, word) in signals.items():
        folder = tmp_path / number.name
        output = folder / "out"
        assert interrupted_run(folder, number) == code
        steps = sorted(int(name.partition("-")[2]) for name in names_in(output) if name.startswith("checkpoint-"))
        assert all(names_in(output / f"checkpoint-{step}") == CHECKPOINT for step in steps)
        assert not set(names_in(output)) & set(MODEL)
        newest = output / f"checkpoint-{steps[-1]}"
        if word is not None:
            assert ".saving" not in names_in(output)
            how = f"The same command with --resume_from_checkpoint {newest} goes on from there"
            assert message((folder / "stderr").read_text()) == f"finetune.py: {word}. {how}"
        resume = arguments(folder, steps[-1] + 2, "--resume_from_checkpoint", newest)
        assert run_here(finetune.main, "finetune.py", resume) == 0
        assert read_json(output / "run_summary.json")["steps"] == steps[-1] + 2
        assert ".saving" not in names_in(output)


def interrupted_run(folder: Path, number: signal.Signals) -> int:
    """Start a long run, signal it when its second checkpoint is there; returns the exit code."""
    folder.mkdir()
    words = [sys.executable, "finetune.py", *map(str, arguments(folder, 100_000))]
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(words, cwd=REPO, env=environment(), stdout=stderr, stderr=stderr)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "out" / "checkpoint-4").exists():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "stderr").read_text()
            time.sleep(0.01)
        process.send_signal(number)
        return process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()


# Ends the process at once in the middle of the second checkpoint, as a lost machine does.
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


def test_a_process_that_is_killed_while_it_saves(tmp_path: Path) -> None:
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


def test_limits_and_the_best_checkpoint(tmp_path: Path) -> None:
    """Written elsewhere first, they still are what transformers makes of them."""
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


def test_checkpoints_of_two_processes(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port"]
    run_well(*torchrun, free_port(), "finetune.py", *arguments(tmp_path, 2))
    ours = sorted({*CHECKPOINT, "rng_state_0.pth", "rng_state_1.pth"} - {"rng_state.pth"})
    run_well(*torchrun, free_port(), "finetune.py", *arguments(tmp_path, 4, "--resume_from_checkpoint", "True"))
    for step in (2, 4):
        assert names_in(tmp_path / "out" / f"checkpoint-{step}") == ours
    assert ".saving" not in names_in(tmp_path / "out")
