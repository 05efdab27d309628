"""Runs of finetune.py: the loss falls, and the saved weights are the trained ones."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import merge_lora
from qwen_model.register import register_qwen
from tests.commands import PLAIN, finetune_here, logged_losses, names_in, read_json, read_log, run_all, run_well
from tests.models import TINY, copy_checkpoint, copy_tied, write_conversations

register_qwen()

IDS = torch.tensor([[701, 39, 72, 702, 198, 5, 6, 7, 701, 702, 300, 400]])


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


# --------------------------------------------------------------------------------------------- real vocabulary and data


@pytest.mark.parametrize(
    "mode", [["--learning_rate", "5e-3"], ["--use_lora", "--learning_rate", "2e-2"]], ids=["full", "lora"]
)
def test_the_loss_falls_on_real_conversations(shared: Path, tmp_path: Path, mode: list[str]) -> None:
    """With Qwen's vocabulary of 151,936 rows: by at least one nat, in sixteen steps of two conversations."""
    output = tmp_path / "out"
    run_well(
        "finetune.py", *PLAIN, "--model_name_or_path", shared / "golden" / "tiny-qwen", "--data_path",
        shared / "corpora" / "fastchat_dummy_conversation.json", "--output_dir", output, "--max_steps", 16,
        "--per_device_train_batch_size", 2, "--model_max_length", 80, "--logging_steps", 4,
        "--lr_scheduler_type", "constant", "--save_strategy", "no", *mode,
    )  # fmt: skip
    losses = logged_losses(output)
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 1.0
    report = read_json(output / "run_summary.json")["data"]["train"]
    assert report["read"] == 500 and report["kept"] + report["skipped"] == 500
    weights = "adapter_model.safetensors" if "--use_lora" in mode else "model.safetensors"
    assert weights in names_in(output)


# --------------------------------------------------------------------------------------------------------- a base model


def test_base_model_learns_chatml_and_merges_with_its_embeddings(tmp_path: Path) -> None:
    base = copy_checkpoint(tmp_path / "base", chat_format="raw")
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    run_well(
        "finetune.py", *PLAIN, "--model_name_or_path", base, "--data_path",
        write_conversations(tmp_path / "train.json"), "--output_dir", adapter, "--use_lora", "--max_steps", 10,
        "--learning_rate", 1e-2, "--save_strategy", "no",
    )  # fmt: skip
    assert read_json(adapter / "run_summary.json")["trainable_embeddings"]["mode"] == "full"
    run_well("merge_lora.py", "--adapter", adapter, "--output", merged)

    trained = logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    )
    folded = AutoModelForCausalLM.from_pretrained(merged)
    assert (logits(folded) - trained).abs().max() <= 1e-4
    saved, stored = load_file(adapter / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    for name in ("transformer.wte.weight", "lm_head.weight"):
        assert not torch.equal(saved[f"base_model.model.{name}"], stored[name].float()), name
        assert torch.equal(folded.get_parameter(name), saved[f"base_model.model.{name}"]), name
    # Both folders are marked as chat models.
    for folder in (adapter, merged):
        config = read_json(folder / "generation_config.json")
        assert (config["chat_format"], config["eos_token_id"]) == ("chatml", [702, 700])


@pytest.mark.parametrize("mode", ["none", "full", "chatml_tokens"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_merged_weights_equal_base_plus_adapter(tmp_path: Path, mode: str, tied: bool) -> None:
    base = copy_tied(tmp_path / "base") if tied else copy_checkpoint(tmp_path / "base")
    run = finetune_here(
        "--model_name_or_path", base, "--data_path", write_conversations(tmp_path / "train.json"), "--output_dir",
        tmp_path / "adapter", "--use_lora", "--trainable_embeddings", mode, "--lora_bias", "all", "--max_steps", 3,
        "--learning_rate", 1e-2, "--save_strategy", "no",
    )  # fmt: skip
    merge_lora.main(["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - logits(run.model)).abs().max() <= 1e-4
    assert merged.config.tie_word_embeddings == tied


# --------------------------------------------------------------------------------------------------------------- resume


def test_resumed_run_ends_like_an_complete_one(tmp_path: Path) -> None:
    """Including LoRA's dropout, so the random state is restored too."""
    data = write_conversations(tmp_path / "train.json")
    modes = {"lora": ["--use_lora"], "full": []}

    def command(name: str, *flags: object) -> list[object]:
        return [
            "finetune.py", *PLAIN, "--model_name_or_path", TINY, "--data_path", data, "--output_dir", tmp_path / name,
            "--max_steps", 6, "--per_device_train_batch_size", 3, "--learning_rate", 5e-3, "--logging_steps", 1,
            "--save_strategy", "steps", "--save_steps", 3, *flags,
        ]  # fmt: skip

    for result in run_all([command(name, *flags) for name, flags in modes.items()]):
        assert result.returncode == 0, result.stderr
    for name in modes:
        # The files of a run that died after its fourth step.
        cut = tmp_path / f"{name}-cut"
        shutil.copytree(tmp_path / name / "checkpoint-3", cut / "checkpoint-3")
        lines = (tmp_path / name / "training_log.jsonl").read_text().splitlines(keepends=True)
        (cut / "training_log.jsonl").write_text("".join(lines[:4]))
    commands = [
        command("lora-cut", *modes["lora"], "--resume_from_checkpoint", tmp_path / "lora-cut" / "checkpoint-3"),
        command("full-cut", *modes["full"], "--resume_from_checkpoint", "True"),
    ]
    for result in run_all(commands):
        assert result.returncode == 0, result.stderr
    for name, file in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        complete, resumed = (load_file(tmp_path / run / file) for run in (name, f"{name}-cut"))
        assert complete.keys() == resumed.keys()
        for key, tensor in complete.items():
            assert (resumed[key] - tensor).abs().max() <= 1e-6, key
        log = read_log(tmp_path / f"{name}-cut")
        assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
        assert [row["loss"] for row in log] == pytest.approx(logged_losses(tmp_path / name), rel=1e-6)


# ---------------------------------------------------------------------------------------------------- variants of a run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Variants of one LoRA run of one epoch."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_conversations(folder / "train.json")
    evaluation = ["--eval_data_path", data, "--eval_strategy", "steps", "--eval_steps", 2]
    reports = ["--report_to", "tensorboard"] if importlib.util.find_spec("tensorboard") else []
    variants: dict[str, list[object]] = {
        "plain": [],
        "padded": ["--padding_free", "False"],
        "checkpointing": ["--gradient_checkpointing", "True"],
        "bf16": ["--bf16", "True"],
        "grouped": ["--train_sampling_strategy", "group_by_length", "--padding_free", "False", *evaluation, *reports],
    }
    commands: list[list[object]] = [
        [
            "finetune.py", *PLAIN, "--model_name_or_path", TINY, "--data_path", data, "--output_dir", folder / name,
            "--use_lora", "--lora_dropout", 0, "--num_train_epochs", 1, "--per_device_train_batch_size", 2,
            "--learning_rate", 1e-2, "--logging_steps", 1, "--save_strategy", "no", *flags,
        ]
        for name, flags in variants.items()
    ]  # fmt: skip
    for result in run_all(commands):
        assert result.returncode == 0, result.stderr
    return {name: folder / name for name in variants}


def test_gradient_checkpointing_keeps_the_losses(runs: dict[str, Path]) -> None:
    assert len(logged_losses(runs["plain"])) == 4
    assert logged_losses(runs["checkpointing"]) == pytest.approx(logged_losses(runs["plain"]), rel=1e-5)


def test_bfloat16_keeps_the_losses_up_to_rounding(runs: dict[str, Path]) -> None:
    """bfloat16 has eight significant bits: a relative error of up to 0.4 % per rounding."""
    plain, rounded = logged_losses(runs["plain"]), logged_losses(runs["bf16"])
    assert rounded != plain
    assert rounded == pytest.approx(plain, rel=0.01)
    saved = load_file(runs["bf16"] / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}  # the base's


def test_grouping_by_length_trains_the_same_conversations_with_no_more_padding(runs: dict[str, Path]) -> None:
    """``tests/unit/training/test_samplers.py`` tests the order; eight conversations have few possible orders."""
    padded, grouped = ([row for row in read_log(runs[name]) if "loss" in row] for name in ("padded", "grouped"))
    assert grouped[-1]["tokens"] == padded[-1]["tokens"]
    assert sum(row["padding"] for row in grouped) <= sum(row["padding"] for row in padded) > 0


def test_rows_without_padding_train_as_padded_batches_do(runs: dict[str, Path]) -> None:
    assert logged_losses(runs["plain"]) == pytest.approx(logged_losses(runs["padded"]), rel=1e-5)
    assert set(logged_losses(runs["plain"], "padding")) == {0}
    adapters = [load_file(runs[name] / "adapter_model.safetensors") for name in ("plain", "padded")]
    assert all((adapters[1][key] - tensor).abs().max() <= 1e-4 for key, tensor in adapters[0].items())


def test_evaluation_is_logged(runs: dict[str, Path]) -> None:
    rows = [row for row in read_log(runs["grouped"]) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[1]["eval_loss"] < rows[0]["eval_loss"] < 7.4
    assert read_json(runs["grouped"] / "run_summary.json")["last_eval_loss"] == rows[1]["eval_loss"]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_is_written_only_with_report_to(runs: dict[str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = list(runs["grouped"].rglob("events.out.tfevents.*"))
    accumulator = EventAccumulator(str(events)).Reload()
    losses = {event.step: event.value for event in accumulator.Scalars("train/loss")}
    assert losses == pytest.approx({row["step"]: row["loss"] for row in read_log(runs["grouped"]) if "loss" in row})
    assert [event.step for event in accumulator.Scalars("eval/loss")] == [2, 4]
    assert not list(runs["plain"].rglob("events.out.tfevents.*"))
