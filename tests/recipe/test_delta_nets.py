"""A whole folder of Qwen3.5 through the commands: trained, resumed, asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts import ask
from tests.bases import TEMPLATE
from tests.commands import PLAIN, finetune_here, logged_losses, read_json, run_here
from tests.models import CONVERSATIONS, write_conversations
from tests.whole_folders import write_whole_folder

STEPS, SAVED = 60, 40
QUESTION, ANSWER = CONVERSATIONS[1][0][1], CONVERSATIONS[1][1][1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_folder(tmp_path_factory.mktemp("base") / "model", TEMPLATE)


def train(base: Path, folder: Path, *flags: object) -> Path:
    folder.mkdir(exist_ok=True)
    data = write_conversations(folder / "train.json")
    finetune_here(
        *PLAIN, "--model_name_or_path", base, "--data_path", data, "--output_dir", folder / "out", "--max_steps", STEPS,
        "--logging_steps", 1, "--learning_rate", 1e-2, "--gradient_checkpointing", "True", "--save_strategy", "steps",
        "--save_steps", SAVED, "--eval_data_path", data, "--eval_strategy", "steps", "--eval_steps", STEPS, *flags,
    )  # fmt: skip
    return folder / "out"


@pytest.fixture(scope="module")
def output(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(base, tmp_path_factory.mktemp("trained"))


def test_it_learns_and_answers(output: Path, capfd: pytest.CaptureFixture[str]) -> None:
    losses = logged_losses(output)
    assert losses[0] > 6 and losses[-1] < 0.5
    assert read_json(output / "run_summary.json")["model_type"] == "qwen3_5_text"
    assert run_here(ask.main, "scripts.ask", ["--model_name_or_path", output, QUESTION]) == 0
    assert capfd.readouterr().out == f"{ANSWER}\n"


def test_a_resumed_run_ends_with_the_same_bits(base: Path, output: Path, tmp_path: Path) -> None:
    resumed = train(base, tmp_path, "--resume_from_checkpoint", output / f"checkpoint-{SAVED}")
    assert logged_losses(resumed) == logged_losses(output)[SAVED:]
    tensors, expected = (load_file(folder / "model.safetensors") for folder in (resumed, output))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
