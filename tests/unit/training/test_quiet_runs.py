"""A run without a fault warns of nothing, and ends with what lies where and what comes next."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from scripts.make_tiny_qwen import main as make_tiny_qwen
from tests.commands import finetune_here, logged_losses
from tests.models import CONVERSATIONS, TINY, write_conversations
from training.callbacks import ShortRunLogging

MODES = {
    "all parameters": [],
    "LoRA": ["--use_lora"],
    "LoRA, embeddings": ["--use_lora", "--trainable_embeddings", "chatml_tokens"],
    "warm-up alone": ["--use_lora", "--max_steps", "2", "--warmup_steps", "3"],
    "bfloat16": ["--use_lora", "--bf16"],
    "evaluations": ["--eval_split", "0.25", "--eval_strategy", "steps", "--load_best_model_at_end", "--eval_steps",
                    "1", "--save_strategy", "steps", "--save_steps", "1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "train.json", CONVERSATIONS)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint, as the quickstart trains it: its first loss is worse than guessing."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_qwen(["--output", str(folder)])
    return folder


def lines_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """Return the lines above INFO of a run, those of libraries and Python's warnings included."""
    transformers_logging.enable_propagation()
    capsys.readouterr()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)  # as outside of tests
            finetune_here(*arguments)
    finally:
        transformers_logging.disable_propagation()
    written = capsys.readouterr().err
    assert " INFO Done: " in written
    lines = [line for line in written.splitlines() if re.search("WARNING|ERROR|Warning", line)]
    return lines + [str(each.message) for each in caught]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_without_a_fault_warns_of_nothing(
    mode: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--model_name_or_path", TINY, "--data_path", data, "--output_dir", tmp_path / "out")
    batch = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--save_strategy", "no")
    assert lines_of(capsys, *command, "--max_steps", 2, *batch, *MODES[mode]) == []


def test_the_first_loss_of_untrained_weights_is_no_alarm(
    untrained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--model_name_or_path", untrained, "--data_path", data, "--output_dir", tmp_path / "out")
    assert lines_of(capsys, *command, "--use_lora", "--max_steps", 1, "--save_strategy", "no") == []


@pytest.mark.parametrize("mode", [["--use_lora"], []])
def test_the_end_of_a_run_says_what_comes_next(
    mode: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --logging_steps each step of a short run is logged."""
    output = tmp_path / "my run"
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--output_dir", output, *mode, "--max_steps", 3,
        "--save_strategy", "no", "--per_device_train_batch_size", 2,
    )  # fmt: skip
    done, *rows = capsys.readouterr().err.split(" INFO Done: ")[1].splitlines()
    assert done.startswith("3 steps in ") and "loss " in done
    words = {row.split()[0]: row for row in rows}
    first = ["learnt", "adapter"] if mode else ["learnt", "model"]
    assert list(words) == [*first, "records", "ask", *(["merge"] if mode else ["vllm", "gguf"])]
    assert f"{output}" in words["adapter" if mode else "model"]
    assert f"'{output}'" in words["ask"] and "scripts.ask" in words["ask"]
    assert not mode or f"merge_lora.py --adapter '{output}' --output '{output}-merged'" in words["merge"]
    for name in words["records"].split(maxsplit=1)[1].split(", "):
        assert (output / name).is_file()
    assert len(logged_losses(output)) == 3


def test_long_runs_log_every_tenth_step(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for steps, interval in ((100, 1), (101, 10)):
        state = TrainerState(max_steps=steps, logging_steps=10)
        ShortRunLogging().on_train_begin(args, state, TrainerControl())
        assert state.logging_steps == interval
