"""Records of a run: its log, summary, arguments and loss curve."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path

import pytest

from checkpoints.shards import fingerprint
from data_utils.encode import EncodeOptions, Encoder
from loading.checkpoint import load_checkpoint
from tests.commands import Recorder, finetune_here, logged_losses, read_json, read_log
from tests.data import load
from tests.models import CONVERSATIONS, TINY, copy_checkpoint, write_conversations
from training.config.parsing import parse_args

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LONG = [("user", "word " * 400), ("assistant", "Too long.")]
LONG_ENDED = [*CONVERSATIONS[0], ("user", "word " * 400), ("assistant", "Too long.")]
MAX_LENGTH = 200


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write ten conversations: one is too long, one fits in part."""
    return write_conversations(tmp_path_factory.mktemp("data") / "train.json", [*CONVERSATIONS, LONG, LONG_ENDED])


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "eval.json", CONVERSATIONS[:3])


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, data: Path, held_out: Path) -> Path:
    """Run three epochs of three steps, with an evaluation after each epoch."""
    output = tmp_path_factory.mktemp("run") / "out"
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--eval_data_path", held_out, "--output_dir", output,
        "--use_lora", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--num_train_epochs", 3,
        "--logging_steps", 2, "--eval_strategy", "epoch", "--model_max_length", MAX_LENGTH,
        "--learning_rate", 1e-3, "--lr_scheduler_type", "constant", "--save_strategy", "no", "--padding_free", False,
    )  # fmt: skip
    return output


def test_log_has_a_row_per_logged_step(output: Path) -> None:
    rows = read_log(output)
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [2, 4, 6, 8]
    keys = {
        "step", "loss", "token_accuracy", "lr", "grad_norm", "tokens_per_second", "padding", "peak_memory_gib",
        "eta_seconds", "elapsed", "tokens", "samples", "epoch",
    }  # fmt: skip
    assert all(row.keys() == keys for row in training)
    assert all(isinstance(value, (int, float)) for row in rows for value in row.values())
    assert {row["lr"] for row in training} == {1e-3}
    assert all(6 < row["loss"] < 8 and row["grad_norm"] > 0 for row in training)


def test_log_has_a_row_per_evaluation(output: Path) -> None:
    rows = [row for row in read_log(output) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [3, 6, 9]
    names = {"step", "eval_loss", "eval_token_accuracy", "elapsed", "tokens", "samples", "epoch"}
    assert all(row.keys() == names for row in rows)
    assert all(6 < row["eval_loss"] < 8 for row in rows)


def test_steps_time_and_tokens_never_decrease(output: Path) -> None:
    rows = read_log(output)
    for name in ("step", "elapsed", "tokens"):
        values = [row[name] for row in rows]
        assert values == sorted(values) and values[0] > 0, name


def test_logged_tokens_are_the_trained_targets(output: Path, data: Path) -> None:
    checkpoint = load_checkpoint(str(TINY))
    encoder = Encoder(checkpoint.tokenizer, checkpoint.family, EncodeOptions(max_length=MAX_LENGTH))
    examples = load(encoder, data)
    per_epoch = sum(label != -100 for example in examples for label in example["labels"][1:])
    assert [row["tokens"] for row in read_log(output) if "eval_loss" in row] == [per_epoch * n for n in (1, 2, 3)]
    assert read_json(output / "run_summary.json")["trained_tokens"] == 3 * per_epoch


def test_summary_of_a_run(output: Path, data: Path, held_out: Path) -> None:
    summary = read_json(output / "run_summary.json")
    losses, eval_losses = logged_losses(output), logged_losses(output, "eval_loss")
    rank, alpha_layers = 64, {(32, 96): 2, (32, 32): 2, (32, 64): 4, (64, 32): 2}  # c_attn, attn.c_proj, w1 w2, c_proj
    lora = sum(rank * (rows + columns) * count for (rows, columns), count in alpha_layers.items())
    base = 82_272
    expected = {
        "base_model": str(TINY), "base_fingerprint": fingerprint(TINY), "base_is_quantized": False,
        "model_type": "qwen", "mode": "lora",
        "trained_parameters": lora, "parameters": base + lora, "steps": 9,
        "first_loss": losses[0], "last_loss": losses[-1], "last_eval_loss": eval_losses[-1],
        "last_token_accuracy": logged_losses(output, "token_accuracy")[-1],
        "trainable_embeddings": {
            "mode": "none", "reason": "auto: chat_format in generation_config.json is chatml: a chat model"
        },
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    assert 0 < summary["seconds"] < 300
    assert summary["trained_tokens_per_second"] == pytest.approx(
        summary["trained_tokens"] / summary["seconds"], rel=0.01, abs=0.1
    )
    assert 0.05 < summary["peak_memory"]["cpu_gib"] < 64
    shares = logged_losses(output, "padding")
    assert min(shares) < summary["padding"] < max(shares)


def test_summary_contains_the_figures_of_the_data(output: Path, data: Path, held_out: Path) -> None:
    figures = read_json(output / "run_summary.json")["data"]
    assert figures.keys() == {"train", "eval"}
    train, evaluation = figures["train"], figures["eval"]
    assert (train["path"], evaluation["path"]) == (str(data), str(held_out))
    assert [train[key] for key in ("read", "kept", "skipped", "truncated")] == [10, 9, 1, 1]
    assert [evaluation[key] for key in ("read", "kept", "skipped", "truncated")] == [3, 3, 0, 0]
    reason = f"no answer fits within --model_max_length {MAX_LENGTH}"
    assert train["skipped_at"] == [{"where": f"{data}:1 (record 9)", "reason": reason}]
    assert train["truncated_at"] == [f"{data}:1 (record 10)"]
    assert train["tokens"] > train["trained_tokens"] > 100


def test_summary_contains_versions(output: Path) -> None:
    packages = ("torch", "transformers", "peft", "accelerate", "safetensors", "tiktoken")
    expected = {name: importlib.metadata.version(name) for name in packages}
    assert read_json(output / "run_summary.json")["versions"] == {"python": platform.python_version(), **expected}


def test_run_args_contain_all_flags(output: Path, data: Path, held_out: Path) -> None:
    recorded = read_json(output / "run_args.json")
    assert recorded.keys() == parse_args([]).to_dict().keys()
    expected = {
        "model_name_or_path": str(TINY), "data_path": [str(data)], "eval_data_path": [str(held_out)],
        "output_dir": str(output), "use_lora": True, "lora_r": 64, "learning_rate": 1e-3, "num_train_epochs": 3.0,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "model_max_length": MAX_LENGTH,
        "eval_strategy": "epoch", "label_mask": "assistant", "seed": 42,
    }  # fmt: skip
    assert {key: recorded[key] for key in expected} == expected


def test_loss_curve_is_a_png(output: Path) -> None:
    picture = (output / "training_loss.png").read_bytes()
    assert picture.startswith(PNG_SIGNATURE) and len(picture) > 5_000
    width, height = (int.from_bytes(picture[start : start + 4], "big") for start in (16, 20))
    assert width >= 600 and height >= 400


def test_full_training_has_no_embeddings_policy(tmp_path: Path, data: Path) -> None:
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--output_dir", tmp_path / "out", "--max_steps", 1,
        "--logging_steps", 1, "--save_strategy", "no",
    )  # fmt: skip
    summary = read_json(tmp_path / "out" / "run_summary.json")
    assert (summary["mode"], summary["trainable_embeddings"]) == ("full", None)
    assert summary["trained_parameters"] == summary["parameters"] == 82_272
    assert (summary["first_loss"], summary["last_eval_loss"]) == (summary["last_loss"], None)


def train(tmp_path: Path, data: Path, *flags: object) -> Recorder:
    return finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--output_dir", tmp_path / "out", "--use_lora",
        "--max_steps", 4, "--logging_steps", 1, "--save_steps", 2, *flags,
    )  # fmt: skip


def test_log_of_a_resumed_run_continues(tmp_path: Path, data: Path) -> None:
    """Steps after the checkpoint are repeated and their old rows removed; time and tokens keep growing."""
    train(tmp_path, data)
    uninterrupted = read_log(tmp_path / "out")
    padding = read_json(tmp_path / "out" / "run_summary.json")["padding"]
    train(tmp_path, data, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2")
    resumed = read_log(tmp_path / "out")
    assert [row["step"] for row in resumed] == [1, 2, 3, 4]
    assert resumed[:2] == uninterrupted[:2]
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in uninterrupted], rel=1e-6)
    assert [row["tokens"] for row in resumed] == [row["tokens"] for row in uninterrupted]
    elapsed = [row["elapsed"] for row in resumed]
    assert elapsed == sorted(elapsed)
    summary = read_json(tmp_path / "out" / "run_summary.json")
    assert summary["padding"] == padding
    assert summary["trained_tokens"] == uninterrupted[-1]["tokens"]
    assert (summary["steps"], summary["first_loss"]) == (4, uninterrupted[0]["loss"])


def test_a_partial_last_row_does_not_stop_a_resumed_run(tmp_path: Path, data: Path) -> None:
    """A machine can crash while it writes a row."""
    train(tmp_path, data)
    log = tmp_path / "out" / "training_log.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "lo')
    train(tmp_path, data, "--resume_from_checkpoint", "True")
    assert [row["step"] for row in read_log(tmp_path / "out")] == [1, 2, 3, 4]


def test_start_up_block(tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The block before the first step: model, mode, trained parameters, data, steps and global batch."""
    base = copy_checkpoint(tmp_path / "base", chat_format="raw")
    finetune_here(
        "--model_name_or_path", base, "--data_path", data, "--output_dir", tmp_path / "out", "--use_lora", "--bf16",
        "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--num_train_epochs", 2,
        "--trainable_embeddings", "auto", "--save_strategy", "no",
    )  # fmt: skip
    lines = capfd.readouterr().err.splitlines()
    start = next(index for index, line in enumerate(lines) if line.endswith("INFO Fine-tuning"))
    block = dict(line.strip().split(maxsplit=1) for line in lines[start + 1 : start + 10])
    figures = json.loads((tmp_path / "out" / "run_summary.json").read_text())["data"]["train"]
    assert block == {
        "model": f"{base} (qwen, saved in float32)",
        "mode": "LoRA, bf16 on cpu",
        "embeddings": "full (auto: chat_format in generation_config.json is 'raw': a base model, not trained on the "
        "ChatML tokens)",
        "trained": "122,880 of 205,152 parameters (59.90%)",
        "data": f"10 of 10 conversations, {figures['tokens']:,} tokens",
        "targets": f"{figures['trained_tokens']:,} tokens ({figures['trained_tokens'] / figures['tokens']:.1%})",
        "steps": "6 of 4 samples (3 per epoch)",
        "rows": "2 micro-batches of a step are joined to about 1.2 rows of up to 2,472 tokens",
        "output": str(tmp_path / "out"),
    }


def test_evaluation_loss_is_the_mean_over_its_targets(tmp_path: Path, data: Path) -> None:
    """It does not depend on the batch size. Beyond seq_length, 64, evaluation computes differently from training."""
    losses = []
    for batch in (1, 3, 8):
        run = finetune_here(
            "--model_name_or_path", TINY, "--data_path", data, "--eval_data_path", data, "--output_dir",
            tmp_path / str(batch), "--max_steps", 1, "--eval_strategy", "steps", "--eval_steps", 1,
            "--per_device_eval_batch_size", batch, "--learning_rate", 1e-9, "--save_strategy", "no",
            "--per_device_train_batch_size", 10, "--logging_steps", 1, "--model_max_length", 64,
        )  # fmt: skip
        losses += run.losses("eval_loss")
    # One step of the whole file that changes nothing has the same loss.
    assert losses == pytest.approx([run.losses()[0]] * 3, rel=1e-6)
