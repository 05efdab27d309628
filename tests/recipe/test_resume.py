"""A resumed run ends bit-identical to an uninterrupted one: weights, log and selected checkpoint."""

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

# Case: precision of the saved base, flags, and steps of the checkpoints to resume from. An epoch has 6 steps, a run 9,
# or fewer if it stops early.
CASES: dict[str, tuple[str, list[object], list[int]]] = {
    "lora": ("bfloat16", [*LORA, *EVALUATE, "--logging_steps", 5], [2, 6, 9]),
    "lora, bf16": ("bfloat16", [*LORA, "--bf16", *EVALUATE], [4]),
    "lora, pure_bf16": ("bfloat16", [*LORA, "--pure_bf16"], [4]),
    "lora and embeddings": ("bfloat16", [*LORA, "--trainable_embeddings", "full"], [4]),
    "lora and token rows": ("bfloat16", [*LORA, "--trainable_embeddings", "chatml_tokens"], [4]),
    "full": ("bfloat16", ["--bf16", "--data_mixing", "sequential"], [4, 8]),
    "full, pure_bf16": ("bfloat16", ["--pure_bf16"], [4]),
    "full, float32": ("float32", ["--train_sampling_strategy", "group_by_length", *EVALUATE], [4, 8]),
    "packing": ("float32", [*LORA, "--packing", "--model_max_length", 80], [4]),
    "workers": ("float32", [*LORA, "--dataloader_num_workers", 2], [4]),
    "joined": ("float32", [*LORA, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4], [4]),
    "best": ("float32", [*LORA, *BEST, "--learning_rate", 1e-2], [2, 4]),
    "stopped early": ("float32", [*LORA, *BEST, "--metric_for_best_model", "token_accuracy"], [2, 4, 6]),
    "schedule free": ("float32", [*LORA, *BEST, "--optim", "schedule_free_adamw", "--learning_rate", 0.1], [2, 4]),
    "by epochs": ("float32", [*LORA, "--eval_strategy", "epoch", "--logging_strategy", "epoch"], [6, 9]),
}
USUAL = ("full", "lora", "lora and embeddings", "packing", "joined", "stopped early", "workers")  # the others are long
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


def die_after(output: Path, step: int) -> None:
    """Turn the folder of a finished run into that of a run that died some time after a checkpoint."""
    for path in output.iterdir():
        if path.name.startswith("checkpoint-") and int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
        elif path.name not in ("training_log.jsonl", "run_args.json") and path.is_file():
            path.unlink()
    with (output / "training_log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # it died while it wrote a row


@pytest.mark.parametrize(
    "case", [case if case in USUAL else pytest.param(case, marks=pytest.mark.long) for case in CASES]
)
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path, base: Path, case: str) -> None:
    dtype, flags, steps = CASES[case]
    if case == "schedule free":
        pytest.importorskip("schedulefree")
    command = arguments(tmp_path, base if dtype == "bfloat16" else TINY, *flags)
    if case == "joined":  # two of the others fit into a row as long as this one
        write_conversations(tmp_path / "b.json", [*(CONVERSATIONS[2:] * 2)[1:], CONVERSATIONS[3] * 3])
    finetune_here(*command)
    output, uninterrupted = tmp_path / "out", tmp_path / "uninterrupted"
    shutil.copytree(output, uninterrupted)
    expected, rows = weights(uninterrupted), log(uninterrupted)
    assert len({json.dumps(row) for row in rows}) == len(rows) > 1
    assert rows[-1]["step"] == (6 if case == "stopped early" else 9)
    for step in steps:
        shutil.rmtree(output)
        shutil.copytree(uninterrupted, output)
        die_after(output, step)
        resumed = finetune_here(*command)
        resumed_weights = weights(output)
        assert resumed_weights.keys() == expected.keys()
        for name, tensor in expected.items():
            assert resumed_weights[name].dtype == tensor.dtype, (step, name)
            assert torch.equal(resumed_weights[name], tensor), (step, name)
        assert log(output) == rows, step
        assert names_in(output) == names_in(uninterrupted)
        assert len(resumed.gradients) == rows[-1]["step"] - step  # no step more, none less
        summaries = [read_json(folder / "run_summary.json") for folder in (uninterrupted, output)]
        for name in ("steps", "trained_tokens", "padding"):
            assert summaries[0][name] == summaries[1][name]


def test_a_run_killed_in_every_phase_ends_identical(tmp_path: Path) -> None:
    """It is killed while it loads, in a step, in an evaluation and while it saves; the same command resumes it."""
    result = tmp_path / "result.json"
    run_well("-m", "benchmarks.kill_resume", "--short", "--output", result)
    [row] = read_json(result)["rows"]
    assert row["identical"] and len(row["kills"]) == 4 and row["starts"] == 5
    assert {kill["phase"] for kill in row["kills"]} == {"loading", "step", "evaluation", "saving"}
    assert len({kill["hit"] for kill in row["kills"]}) > 1  # phases are observed from outside, so some are missed


def test_evaluations_do_not_change_the_random_numbers_of_training(tmp_path: Path, base: Path) -> None:
    results = []
    for name, flags in (("without", []), ("with", [*EVALUATE, "--eval_on_start", "True"])):
        (tmp_path / name).mkdir()
        finetune_here(*arguments(tmp_path / name, base, *LORA, *flags))
        results.append(weights(tmp_path / name / "out"))
    for name, tensor in results[0].items():
        assert torch.equal(results[1][name], tensor), name


def test_intervals_can_change_without_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = arguments(tmp_path, TINY, *LORA)
    finetune_here(*command)
    die_after(tmp_path / "out", 4)
    capfd.readouterr()
    finetune_here(*command, "--save_steps", 3, "--logging_steps", 2)
    assert {"checkpoint-4", "checkpoint-6", "checkpoint-9"} <= set(names_in(tmp_path / "out"))
    assert [row["step"] for row in read_log(tmp_path / "out")][-3:] == [4, 6, 8]
    assert "do not match" not in capfd.readouterr().err


def test_a_changed_learning_rate_takes_effect(tmp_path: Path) -> None:
    """transformers would keep the checkpoint's."""
    command = arguments(tmp_path, TINY, *LORA)
    finetune_here(*command)
    output = tmp_path / "out"
    before = [row["lr"] for row in read_log(output)]
    die_after(output, 4)
    finetune_here(*command, "--learning_rate", 3e-3)
    assert [row["lr"] for row in read_log(output)] == pytest.approx([*before[:4], *(3 * rate for rate in before[4:])])
