"""A run that is resumed ends as one that was never interrupted, to the last bit: weights, log and what it chose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import finetune_here, names_in, read_json, read_log, run_well
from tests.models import CONVERSATIONS, TINY, copy_in_bfloat16, write_conversations

LORA = ["--use_lora", "--lora_dropout", 0.1]
EVALUATE = ["--eval_strategy", "steps", "--eval_steps", 2]
BEST = [*EVALUATE, "--load_best_model_at_end", "--early_stopping_patience", 2]

# Name: in which precision the base is saved, the flags, and the steps of the checkpoints it is resumed from. An epoch
# has 6 steps, a run 9 (or less, where it stops early).
CASES: dict[str, tuple[str, list[object], list[int]]] = {
    "lora": ("bfloat16", [*LORA, *EVALUATE, "--logging_steps", 5], [2, 6, 9]),
    "lora in bfloat16": ("bfloat16", [*LORA, "--bf16", *EVALUATE], [4]),
    "lora all in bfloat16": ("bfloat16", [*LORA, "--pure_bf16"], [4]),
    "lora and embeddings": ("bfloat16", [*LORA, "--trainable_embeddings", "full"], [4]),
    "lora and token rows": ("bfloat16", [*LORA, "--trainable_embeddings", "chatml_tokens"], [4]),
    "full": ("bfloat16", ["--bf16", "--data_mixing", "sequential"], [4, 8]),
    "full all in bfloat16": ("bfloat16", ["--pure_bf16"], [4]),
    "full of float32": ("float32", ["--train_sampling_strategy", "group_by_length", *EVALUATE], [4, 8]),
    "workers": ("float32", [*LORA, "--dataloader_num_workers", 2], [4]),
    "best": ("float32", [*LORA, *BEST, "--learning_rate", 1e-2], [2, 4]),
    "stopped early": ("float32", [*LORA, *BEST, "--metric_for_best_model", "token_accuracy"], [2, 4, 6]),
    "by epochs": ("float32", [*LORA, "--eval_strategy", "epoch", "--logging_strategy", "epoch"], [6, 9]),
}
TIMED = ("elapsed", "tokens_per_second", "peak_memory_gib", "eta_seconds")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_in_bfloat16(tmp_path_factory.mktemp("base") / "bfloat16")


def arguments(folder: Path, base: Path, *flags: object) -> list[object]:
    sources = [
        write_conversations(folder / name, conversations)
        for name, conversations in (("a.json", CONVERSATIONS[:6] * 2), ("b.json", CONVERSATIONS[2:] * 2))
    ]
    held_out = write_conversations(folder / "eval.json", CONVERSATIONS[:3])
    return [
        "--model_name_or_path", base, "--data_path", *sources, "--eval_data_path", held_out, "--output_dir",
        folder / "out", "--max_steps", 9, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2,
        "--save_strategy", "steps", "--save_steps", 2, "--logging_steps", 1, "--learning_rate", 1e-3,
        "--resume_from_checkpoint", "auto", *flags,
    ]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [file] = [path for path in folder.iterdir() if path.name in ("adapter_model.safetensors", "model.safetensors")]
    return dict(load_file(file))


def log(output: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMED} for row in read_log(output)]


def die_behind(output: Path, step: int) -> None:
    """Make the folder of a run that is done one of a run that died a while after a checkpoint."""
    for path in output.iterdir():
        if path.name.startswith("checkpoint-") and int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
        elif path.name not in ("training_log.jsonl", "run_args.json") and path.is_file():
            path.unlink()
    with (output / "training_log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # it died while it wrote a line


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, base: Path, case: str) -> None:
    dtype, flags, steps = CASES[case]
    command = arguments(tmp_path, base if dtype == "bfloat16" else TINY, *flags)
    finetune_here(*command)
    output, kept = tmp_path / "out", tmp_path / "kept"
    shutil.copytree(output, kept)
    expected, rows = weights(kept), log(kept)
    assert len({json.dumps(row) for row in rows}) == len(rows) > 1
    assert rows[-1]["step"] == (6 if case == "stopped early" else 9)
    for step in steps:
        shutil.rmtree(output)
        shutil.copytree(kept, output)
        die_behind(output, step)
        resumed = finetune_here(*command)
        found = weights(output)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (step, name)
        assert log(output) == rows, step
        assert names_in(output) == names_in(kept)
        assert len(resumed.gradients) == rows[-1]["step"] - step  # no step more, and none less
        told = [read_json(folder / "run_summary.json") for folder in (kept, output)]
        for name in ("steps", "trained_tokens", "padding"):
            assert told[0][name] == told[1][name]


def test_a_run_that_is_killed_in_every_phase(tmp_path: Path) -> None:
    """While it loads, in a step, in an evaluation, and while it saves; the same command goes on each time."""
    result = tmp_path / "result.json"
    run_well("-m", "benchmarks.kill_resume", "--short", "--output", result)
    [row] = read_json(result)["rows"]
    assert row["identical"] and len(row["kills"]) == 4 and row["starts"] == 5
    assert {kill["phase"] for kill in row["kills"]} == {"loading", "step", "evaluation", "saving"}
    assert len({kill["hit"] for kill in row["kills"]}) > 1  # aimed at from outside, not each is hit


def test_an_evaluation_leaves_the_random_numbers_of_training_as_they_are(tmp_path: Path, base: Path) -> None:
    found = []
    for name, flags in (("without", []), ("with", [*EVALUATE, "--eval_on_start", "True"])):
        (tmp_path / name).mkdir()
        finetune_here(*arguments(tmp_path / name, base, *LORA, *flags))
        found.append(weights(tmp_path / name / "out"))
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def test_a_changed_learning_rate_takes_effect(tmp_path: Path) -> None:
    """The checkpoint's would stay, if nobody did anything about it."""
    command = arguments(tmp_path, TINY, *LORA)
    finetune_here(*command)
    output = tmp_path / "out"
    before = [row["lr"] for row in read_log(output)]
    die_behind(output, 4)
    finetune_here(*command, "--learning_rate", 3e-3)
    assert [row["lr"] for row in read_log(output)] == pytest.approx([*before[:4], *(3 * rate for rate in before[4:])])
