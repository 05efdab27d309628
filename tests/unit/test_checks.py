"""Arguments that cannot work together or with the disk: refused before anything is loaded, in one line with the fix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from errors import ConfigError
from tests.golden import SMALL
from tests.models import TINY
from training.args import parse_args
from training.checks import check_args

DATA = SMALL / "train.json"


def check(tmp_path: Path, *flags: object, output: Path | None = None) -> None:
    """Check a command line that is good but for ``flags``."""
    good = ["--model_name_or_path", TINY, "--data_path", DATA, "--output_dir", output or tmp_path / "new"]
    check_args(parse_args([str(flag) for flag in (*good, *flags)]))


def refuses(message: str, tmp_path: Path, *flags: object, output: Path | None = None) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check(tmp_path, *flags, output=output)


def test_a_good_command_line_passes_and_nothing_is_written(tmp_path: Path) -> None:
    check(tmp_path)
    check(tmp_path, "--use_lora", "--bf16", "--trainable_embeddings", "chatml_tokens")
    check(tmp_path, "--trainable_embeddings", "full")
    check(tmp_path, "--eval_strategy", "steps", "--eval_data_path", DATA)
    assert list(tmp_path.iterdir()) == []


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--data_path is missing\. Give a \.json or \.jsonl file of conversations$"):
        check_args(parse_args(["--model_name_or_path", str(TINY), "--output_dir", str(tmp_path / "new")]))


def test_data_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for flag in ("--data_path", "--eval_data_path"):
        for name, what in (("nowhere.json", "there is no such file"), ("folder", "is a folder")):
            path = tmp_path / name
            refuses(f"{flag} {path}: {what}. Give a .json or .jsonl file of conversations", tmp_path, flag, path)


def test_what_is_not_available_yet(tmp_path: Path) -> None:
    refuses("--q_lora is not available yet. Use --use_lora, with --bf16 on a GPU", tmp_path, "--q_lora")
    refuses("--q_lora is not available yet. Use --use_lora, with --bf16 on a GPU", tmp_path, "--use_lora", "--q_lora")
    refuses(
        "--label_smoothing_factor 0.1 is not available yet. Leave it out", tmp_path, "--label_smoothing_factor", "0.1"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_without_a_gpu(tmp_path: Path) -> None:
    refuses("--fp16 needs a GPU, and there is none. Leave it out, or use --bf16", tmp_path, "--fp16")


@pytest.mark.parametrize("value", [0, -5])
@pytest.mark.parametrize(
    "flag",
    [
        "--model_max_length", "--per_device_train_batch_size", "--per_device_eval_batch_size",
        "--gradient_accumulation_steps", "--lora_r",
    ],
)  # fmt: skip
def test_counts_that_are_none(tmp_path: Path, flag: str, value: int) -> None:
    refuses(f"{flag} {value} is not possible. Give 1 or more", tmp_path, "--use_lora", flag, value)


def test_numbers_that_make_no_sense(tmp_path: Path) -> None:
    message = "--lora_dropout 1.5 is not possible. Give 0 or more and less than 1"
    refuses(message, tmp_path, "--lora_dropout", 1.5)
    refuses("--num_train_epochs 0.0 trains nothing. Give more than 0", tmp_path, "--num_train_epochs", 0)
    check(tmp_path, "--num_train_epochs", 0, "--max_steps", 1)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluation_without_data(tmp_path: Path, strategy: str) -> None:
    message = f"--eval_strategy {strategy} has nothing to evaluate on. Give --eval_data_path too"
    refuses(message, tmp_path, "--eval_strategy", strategy)


def test_flags_of_lora_without_lora(tmp_path: Path) -> None:
    message = "--lora_weight_path old needs --use_lora. Add --use_lora"
    refuses(message, tmp_path, "--lora_weight_path", "old")
    for mode in ("none", "chatml_tokens"):
        message = (
            f"--trainable_embeddings {mode} needs --use_lora: without it all parameters train. "
            "Add --use_lora, or leave it out"
        )
        refuses(message, tmp_path, "--trainable_embeddings", mode)


def test_several_gpus_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.args.FinetuneArguments.n_gpu", 2)
    message = (
        "2 GPUs are visible to one process. Set CUDA_VISIBLE_DEVICES=0, or launch with "
        "torchrun --nproc_per_node 2 finetune.py ..."
    )
    refuses(message, tmp_path)


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    message = f"--output_dir {tmp_path / 'taken'} is a file. Give a folder"
    refuses(message, tmp_path, output=tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_output_that_is_the_model(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(TINY)
    for path in (TINY, TINY / ".." / TINY.name, link):
        refuses(f"--output_dir {path} is the model's own folder. Give another folder", tmp_path, output=path)


def test_output_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    message = (
        f"--output_dir {tmp_path} is not empty. Give a new folder, or --resume_from_checkpoint with one of its "
        "checkpoints"
    )
    refuses(message, tmp_path, output=tmp_path)


def test_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For root, as whom these tests may run, every folder of a real disk is writable."""
    asked = []

    def deny(path: Path, mode: int) -> bool:
        asked.append(Path(path))
        return False

    monkeypatch.setattr("training.checks.os.access", deny)
    output = tmp_path / "a" / "b"
    message = f"--output_dir {output}: {tmp_path} is not writable. Choose a folder you may write to"
    refuses(message, tmp_path, output=output)
    assert asked == [tmp_path]


def test_output_that_is_empty_or_is_continued(tmp_path: Path) -> None:
    check(tmp_path, output=tmp_path)
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    for value, folder in ((tmp_path / "checkpoint-2", "checkpoint-2"), ("True", "checkpoint-10")):
        flags = ["--resume_from_checkpoint", str(value)]
        check(tmp_path, *flags, output=tmp_path)
        assert parse_args(["--output_dir", str(tmp_path), *flags]).resumed_checkpoint() == str(tmp_path / folder)
    assert parse_args(["--output_dir", str(tmp_path)]).resumed_checkpoint() is None


@pytest.mark.parametrize("value", ["/nowhere", "True", "true"])
def test_a_checkpoint_that_is_not_there(tmp_path: Path, value: str) -> None:
    message = f"--resume_from_checkpoint {value}: there is no checkpoint. Give a checkpoint-* folder of the run"
    for output in (tmp_path / "new", tmp_path):
        refuses(message, tmp_path, "--resume_from_checkpoint", value, output=output)


def test_a_reporter_that_is_not_installed(tmp_path: Path) -> None:
    message = "--report_to wandb: it is not installed. pip install wandb, or leave it out"
    refuses(message, tmp_path, "--report_to", "wandb")
    check(tmp_path, "--report_to", "none")
