"""Runs with ``--eval_generate``: greedy answers, their figures, and a training that they do not change."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_utils.examples import ExampleSet
from errors import ConfigError
from loading.checkpoint import load_checkpoint
from loading.inference import load_for_inference
from tests.commands import Recorder, finetune_here, names_in
from tests.models import CONVERSATIONS, TINY, write_conversations, write_later_checkpoint
from tests.worlds import run_on_ranks
from training.config.parsing import parse_args
from training.data import load_data
from training.distributed.heartbeat import RankStatus
from training.held_out import HeldOut, choose_held_out, source_names
from training.training_arguments import build_training_arguments

GENERATES = ("--eval_generate", 5, "--eval_max_new_tokens", 9)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("held out")
    return {
        "train": write_conversations(folder / "train.json"),
        "one": write_conversations(folder / "one file.json", CONVERSATIONS[:5]),
        "two": write_conversations(folder / "two.json", CONVERSATIONS[5:]),
    }


def train(data: dict[str, Path], output: Path, *flags: object, model: Path = TINY) -> Recorder:
    return finetune_here(
        "--model_name_or_path", model, "--data_path", data["train"], "--eval_data_path", data["one"], data["two"],
        "--output_dir", output, "--use_lora", "--gradient_checkpointing", "True", "--lora_dropout", 0.3,
        "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 4, "--max_steps", 4, "--learning_rate", 0.1,
        "--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2, *flags,
    )  # fmt: skip


def samples_in(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "eval_samples.jsonl").read_text(encoding="utf-8").splitlines()]


def greedy(model: Any, tokenizer: Any, prompt: list[int], end_ids: list[int]) -> str:
    """Return what transformers answers to a prompt alone."""
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, repetition_penalty=1.0, max_new_tokens=9, pad_token_id=0, eos_token_id=end_ids,
        )  # fmt: skip
    return str(tokenizer.decode(output[0, len(prompt) :].tolist(), skip_special_tokens=True))


def held_out_of(data: dict[str, Path], *flags: object) -> tuple[HeldOut | None, dict[str, ExampleSet]]:
    args = parse_args([str(each) for each in (
        "--model_name_or_path", TINY, "--data_path", data["train"], "--eval_data_path", data["one"], data["two"],
        "--use_cpu", "True", "--eval_strategy", "epoch", *flags,
    )])  # fmt: skip
    checkpoint = load_checkpoint(args.model.model_name_or_path)
    sets = load_data(args, build_training_arguments(args), checkpoint)
    return choose_held_out(args, checkpoint, sets), sets


@pytest.mark.parametrize("model_type", ["qwen", "qwen3", "qwen3_5_text"])
def test_answers_are_greedy_and_change_no_bit_of_the_training(
    data: dict[str, Path], tmp_path: Path, model_type: str
) -> None:
    model = TINY if model_type == "qwen" else write_later_checkpoint(tmp_path / "model", model_type)
    plain = train(data, tmp_path / "plain", model=model)
    run = train(data, tmp_path / "out", *GENERATES, model=model)
    for name in ("adapter_model.safetensors", "checkpoint-4/optimizer.pt", "checkpoint-4/rng_state.pth"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    assert run.losses() == plain.losses() and run.losses("eval_loss") == plain.losses("eval_loss")

    rows = samples_in(tmp_path / "out")
    assert [row["step"] for row in rows] == [2] * 5 + [4] * 5
    assert [row["source"] for row in rows[:5]] == ["one_file"] * 3 + ["two"] * 2
    held_out, _ = held_out_of(data, "--model_name_or_path", model, *GENERATES)
    if held_out is None:
        pytest.fail("no questions")
    checkpoint = load_checkpoint(str(model))
    trained, end_ids = load_for_inference(checkpoint, str(tmp_path / "out")), list(held_out.answerer.writer.end_ids)
    for row, question in zip(rows[5:], held_out.questions, strict=True):
        assert row["answer"] == greedy(trained, checkpoint.tokenizer, list(question.prompt_ids), end_ids)
        assert row["expected"] in dict(turns[-1][::-1] for turns in CONVERSATIONS)
    figures = [row for row in run.rows if "eval_chrf" in row]
    means = {name: sum(row["scores"][name] for row in rows[5:]) / 5 for name in rows[0]["scores"]}
    assert {name: figures[-1][f"eval_{name}"] for name in means} == pytest.approx(means, abs=1e-6)
    of_two = [row["scores"]["chrf"] for row in rows[5:] if row["source"] == "two"]
    assert figures[-1]["eval_two_chrf"] == pytest.approx(sum(of_two) / 2, abs=1e-6)


def test_loss_of_each_source_is_that_of_the_source_alone(data: dict[str, Path], tmp_path: Path) -> None:
    both = train(data, tmp_path / "both", "--max_steps", 2)
    for name, eval_data in (("one_file", data["one"]), ("two", data["two"])):
        alone = train(data, tmp_path / name, "--max_steps", 2, "--eval_data_path", eval_data)
        assert both.losses(f"eval_{name}_loss") == pytest.approx(alone.losses("eval_loss"))
        assert both.losses(f"eval_{name}_token_accuracy") == alone.losses("eval_token_accuracy")
        assert "eval_two_loss" not in alone.rows[-1]


def test_resumed_run_has_each_answer_once(data: dict[str, Path], tmp_path: Path) -> None:
    best = ("--load_best_model_at_end", "True", "--metric_for_best_model", "chrf", "--early_stopping_patience", 9)
    whole = train(data, tmp_path / "out", *GENERATES, *best)
    content = (tmp_path / "out" / "eval_samples.jsonl").read_bytes()
    scores = whole.losses("eval_chrf")
    assert whole.trainer_state.best_metric == max(scores)
    assert whole.trainer_state.best_global_step == 2 + 2 * scores.index(max(scores))
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    train(data, tmp_path / "out", *GENERATES, *best, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2")
    assert (tmp_path / "out" / "eval_samples.jsonl").read_bytes() == content
    train(data, tmp_path / "out", "--overwrite_output_dir")
    assert "eval_samples.jsonl" not in names_in(tmp_path / "out")


def test_ranks_share_the_questions(data: dict[str, Path]) -> None:
    held_out, sets = held_out_of(data, *GENERATES)
    if held_out is None:
        pytest.fail("no questions")
    model, names = load_for_inference(load_checkpoint(str(TINY))), source_names(sets["eval"])
    alone, *shared = (
        rows
        for size in (1, 3)
        for rows in run_on_ranks(size, lambda world: held_out.evaluate(model, 7, names, world, RankStatus()))
    )
    assert len(alone) == 5 and shared == [alone] * 3


def test_more_questions_than_there_are(data: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        held_out, _ = held_out_of(data, "--eval_generate", 99, "--eval_max_new_tokens", 4)
    assert held_out is not None and len(held_out.questions) == 8
    assert "--eval_generate 99: the evaluation data has 8 questions; all are used" in caplog.messages
    assert "--eval_max_new_tokens 4: 7 of 8 expected answers are longer and cannot be reached" in caplog.messages


def test_data_without_the_answers_that_are_needed_is_refused(data: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A plain text.\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--eval_generate 5: the evaluation data is plain text. Give conversations"):
        held_out_of(data, *GENERATES, "--eval_data_path", tmp_path / "text.txt")
    with pytest.raises(ConfigError, match="--metric_for_best_model call_name: none of the 5 expected answers has it"):
        held_out_of(data, *GENERATES, "--metric_for_best_model", "call_name")
