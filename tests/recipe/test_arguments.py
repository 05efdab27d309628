"""Command lines and config files of users, as complete runs."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.startup import IMPORT, measure_startup
from tests.commands import (
    finetune_here,
    free_port,
    logged_losses,
    names_in,
    read_json,
    read_log,
    run,
    run_all,
    run_well,
)
from tests.models import CONVERSATIONS, TINY, copy_checkpoint, write_conversations

# As in the original's launch scripts, without paths and --deepspeed.
COMMON = (
    '--bf16 True --num_train_epochs 5 --per_device_eval_batch_size 1 --evaluation_strategy no --save_strategy steps '
    '--save_steps 1000 --save_total_limit 10 --weight_decay 0.1 --adam_beta2 0.95 --warmup_ratio 0.01 '
    '--lr_scheduler_type cosine --logging_steps 1 --report_to none --model_max_length 512 '
)  # fmt: skip
FULL = COMMON + (
    "--per_device_train_batch_size 1 --gradient_accumulation_steps 16 --learning_rate 1e-5 "
    "--gradient_checkpointing True --lazy_preprocess True"
)
LORA = COMMON + (
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 8 --learning_rate 3e-4 "
    "--lazy_preprocess True --gradient_checkpointing --use_lora"
)


@pytest.mark.parametrize(
    "kinds", [{"full": "chat", "lora": "base"}, pytest.param({"full": "base", "lora": "chat"}, marks=pytest.mark.long)]
)
def test_command_lines_of_the_original_scripts(tmp_path: Path, kinds: dict[str, str]) -> None:
    """Full parameters and LoRA, chat and base model: five steps with the original's learning rates."""
    data = write_conversations(tmp_path / "train.json")
    models = {"chat": TINY, "base": copy_checkpoint(tmp_path / "base", chat_format="raw")}
    recipes = {(mode, kinds[mode]): flags for mode, flags in (("full", FULL), ("lora", LORA))}
    outputs = {key: tmp_path / "-".join(key) for key in recipes}
    commands = [
        ["finetune.py", "--model_name_or_path", models[key[1]], "--data_path", data, "--output_dir", outputs[key],
         *flags.split()]
        for key, flags in recipes.items()
    ]  # fmt: skip
    for key, result in zip(recipes, run_all(commands), strict=True):
        assert result.returncode == 0, result.stderr
        losses = logged_losses(outputs[key])
        assert len(losses) == 5, key
        arguments, summary = (read_json(outputs[key] / name) for name in ("run_args.json", "run_summary.json"))
        expected = {
            "bf16": True, "eval_strategy": "no", "warmup_steps": 0.01, "adam_beta2": 0.95, "weight_decay": 0.1,
            "gradient_checkpointing": True, "lr_scheduler_type": "cosine", "use_lora": key[0] == "lora",
        }  # fmt: skip
        assert arguments | expected == arguments
        embeddings = {("lora", "chat"): "none", ("lora", "base"): "full"}.get(key)
        assert (summary["trainable_embeddings"] or {}).get("mode") == embeddings
        weights = "adapter_model.safetensors" if key[0] == "lora" else "model.safetensors"
        assert weights in names_in(outputs[key])
        if key[0] == "lora":
            assert losses[-1] < losses[0]
        else:  # four steps of 1e-5 change the weights, but less than the rounding of a bfloat16 loss
            before, after = (load_file(folder / weights) for folder in (models[key[1]], outputs[key]))
            moved = max((after[name] - before[name]).abs().max() for name in before)
            assert 1e-5 <= moved <= 5e-5
        # warmup_steps 0.01 of five steps is one step; then the cosine.
        rates = {"full": 1e-5, "lora": 3e-4}
        assert [row["lr"] for row in read_log(outputs[key])][:2] == [0, rates[key[0]]]


def test_saved_arguments_repeat_the_run(tmp_path: Path) -> None:
    """The first run is a new process, the second a forked one, and they print the same, but for times and memory."""
    first, second = tmp_path / "first", tmp_path / "second"
    printed = run_well(
        "finetune.py", "--model_name_or_path", TINY, "--data_path", write_conversations(tmp_path / "train.json"),
        "--output_dir", first, "--use_lora", "--max_steps", 3, "--learning_rate", 1e-2, "--logging_steps", 1,
        "--warmup_ratio", 0.5, "--system_message", "“Kurz” 😀", "--group_by_length", "--save_strategy", "no",
        "--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-4}', "--bf16",
        "--no_data_cache",
        is_new=True,
    )  # fmt: skip
    repeated = run_well("finetune.py", "--config", first / "run_args.json", "--output_dir", second)
    varying = r"\d+:\d\d(:\d\d)?|[\d,.]+ (tokens/s|GiB|s\b)|first|second"
    shown = [re.sub(varying, "?", result.stdout + result.stderr) for result in (printed, repeated)]
    assert shown[0] == shown[1]
    assert logged_losses(second) == logged_losses(first)
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (first, second)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    arguments = [read_json(folder / "run_args.json") for folder in (first, second)]
    assert arguments[1] == arguments[0] | {"output_dir": str(second)}
    assert (arguments[0]["system_message"], arguments[0]["warmup_steps"]) == ("“Kurz” 😀", 0.5)


def test_yaml_file_as_the_only_argument(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model_name_or_path: {TINY}\ndata_path: {write_conversations(tmp_path / 'train.json')}\n"
        f"output_dir: {tmp_path / 'out'}\nuse_lora: true\nmax_steps: 2\nlearning_rate: 1e-2\nlogging_steps: 1\n"
        "save_strategy: no\n"
    )
    run_well("finetune.py", file)
    assert len(logged_losses(tmp_path / "out")) == 2


@pytest.mark.parametrize("mode", [[], ["--use_lora"], ["--use_lora", "--trainable_embeddings", "chatml_tokens"]])
def test_early_stopping_saves_the_best_model(tmp_path: Path, mode: list[str]) -> None:
    """Overfit four conversations, at a learning rate that soon raises the loss of the other four."""
    data = write_conversations(tmp_path / "train.json", CONVERSATIONS[:4])
    evaluation = write_conversations(tmp_path / "eval.json", CONVERSATIONS[4:])
    output = tmp_path / "out"
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--eval_data_path", evaluation, "--output_dir", output,
        "--evaluation_strategy", "steps", "--eval_steps", 2, "--save_steps", 2, "--max_steps", 60,
        "--load_best_model_at_end", "--early_stopping_patience", 2, "--lr_scheduler_type", "constant",
        "--learning_rate", 5e-2, "--logging_steps", 2, *mode,
    )  # fmt: skip
    losses = logged_losses(output, "eval_loss")
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) == best + 3 < 30, losses
    name = "adapter_model.safetensors" if mode else "model.safetensors"
    saved, best_checkpoint = load_file(output / name), load_file(output / f"checkpoint-{2 * (best + 1)}" / name)
    assert saved.keys() == best_checkpoint.keys()
    assert all(torch.equal(saved[key], best_checkpoint[key]) for key in saved)
    last = load_file(output / f"checkpoint-{2 * len(losses)}" / name)
    assert not all(torch.equal(saved[key], last[key]) for key in saved)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
@pytest.mark.parametrize("has_flag", [True, False])
def test_tensorboard_writes_to_logging_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_flag: bool) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", write_conversations(tmp_path / "train.json"), "--output_dir",
        tmp_path / "out", "--max_steps", 1, "--save_strategy", "no", "--report_to", "tensorboard",
        *(["--logging_dir", tmp_path / "board"] if has_flag else []),
    )  # fmt: skip
    folder = tmp_path / "board" if has_flag else tmp_path / "out" / "runs"
    assert [path for path in folder.rglob("events.out.tfevents.*") if path.stat().st_size > 0]
    assert not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "out" / "runs").exists() is not has_flag


def test_conflicts_are_reported_before_anything_is_loaded(tmp_path: Path) -> None:
    result = run(
        "finetune.py", "--model_name_or_path", TINY, "--data_path", tmp_path / "none.json", "--output_dir",
        tmp_path / "out", "--bf16", "--fp16", "--lora_r", 8,
    )  # fmt: skip
    lines = result.stderr.splitlines()
    assert (result.returncode, result.stdout, len(lines)) == (2, "", 4)
    assert lines[0] == "finetune.py: error: 3 faults in the arguments:"
    assert [line[:5] for line in lines[1:]] == ["  1. ", "  2. ", "  3. "]
    assert not (tmp_path / "out").exists()


def test_preview_and_dry_run_start_no_process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of two processes does not wait for rank 1, which never starts."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    data = ["--model_name_or_path", TINY, "--data_path", write_conversations(tmp_path / "train.json")]
    commands = [["-m", "scripts.preview_data", "--processes", 2, *data], ["finetune.py", *data, "--dry_run"]]
    preview, dry_run = run_all(commands)
    assert (preview.returncode, dry_run.returncode) == (0, 0), preview.stderr + dry_run.stderr
    assert preview.stdout == dry_run.stdout and "a step uses 32 samples" in preview.stdout


@pytest.mark.long
def test_help_and_refusals_are_faster_than_importing_torch() -> None:
    seconds = measure_startup(rounds=1)
    slow = {name: value for name, value in seconds.items() if name != IMPORT and value > 0.4 * seconds[IMPORT]}
    assert slow == {}, seconds


def test_help_lists_the_flags() -> None:
    short, long = (" ".join(run_well("finetune.py", flag).stdout.split()) for flag in ("--help", "--help_all"))
    default = "(default: 1e-05; with --use_lora: 0.0003)"
    for text in ("--model_name_or_path", "--use_lora", "--learning_rate X", default, "--eval_strategy"):
        assert all(text in " ".join(shown.split()) for shown in (short, long)), text
    for text in ("--dataloader_prefetch_factor", "--evaluation_strategy", "--save_safetensors"):
        assert text not in short and text in long
    assert json.dumps(short).isascii()
