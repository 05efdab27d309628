"""An optimizer step is the same however its conversations are split into micro-batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data_utils.encode import EncodeOptions, Encoder, Example
from loading.checkpoint import load_checkpoint, load_model
from tests.commands import Recorder, finetune_here
from tests.data import load
from tests.golden import relative_difference
from tests.models import CONVERSATIONS, TINY, write_conversations, write_later_checkpoint

TOLERANCE = 1e-6
# After the first step the weights differ by its rounding.
SECOND_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen conversations of different lengths and numbers of targets."""
    longer = [[(role, f"{text} {text}") for role, text in turns] for turns in CONVERSATIONS]
    return write_conversations(tmp_path_factory.mktemp("data") / "train.json", [*CONVERSATIONS, *longer])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    later = write_later_checkpoint(tmp_path_factory.mktemp("models") / "model", "qwen2")
    return {"qwen": TINY, "qwen2": later}


def train(model: Path, data: Path, output: Path, batch: int, accumulation: int, *flags: str) -> Recorder:
    """Train with SGD without clipping, so that the second step's gradients also compare the first step's updates."""
    adapter = ["--lora_dropout", 0, "--lora_r", 4, "--lora_alpha", 4] if "--use_lora" in flags else []
    return finetune_here(
        "--model_name_or_path", model, "--data_path", data, "--output_dir", output, "--max_steps", 2,
        "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation, "--optim", "sgd",
        "--learning_rate", 0.1, "--max_grad_norm", 0, "--logging_steps", 1, "--save_strategy", "no",
        *adapter, *flags,
    )  # fmt: skip


def encode(model: Path, data: Path, label_mask: str) -> list[Example]:
    checkpoint = load_checkpoint(str(model))
    options = EncodeOptions(label_mask="qwen" if label_mask == "qwen" else "assistant")
    return list(load(Encoder(checkpoint.tokenizer, checkpoint.family, options), data))


def targets(example: Example) -> list[int]:
    """Return the predicted labels: those after the first token."""
    return [label for label in example["labels"][1:] if label != -100]


def losses_of(model: Path, examples: list[Example]) -> Iterator[float]:
    """Yield each example's summed cross entropy before training, computed one at a time, without padding."""
    network = load_model(load_checkpoint(str(model)), torch.float32)
    for example in examples:
        with torch.no_grad():
            logits = network(torch.tensor([example["input_ids"]])).logits[0]
        yield F.cross_entropy(logits[:-1], torch.tensor(example["labels"][1:]), reduction="sum").item()


def weigh_answers(path: Path) -> Path:
    """Give the answers in a file different weights; weight 0 is not trained."""
    records = json.loads(path.read_text(encoding="utf-8"))
    answers = [turn for record in records for turn in record["conversations"] if turn["from"] == "assistant"]
    for turn, weight in zip(answers, cycle([0.5, 3, 1, 0.25, 0]), strict=False):
        turn["weight"] = weight
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("qwen", ""),
        ("qwen", "--use_lora"),
        ("qwen", "--use_lora --label_mask qwen"),
        ("qwen2", "--use_lora"),
        ("qwen2", "--label_mask qwen"),
    ],
)
def test_micro_batches_do_not_change_the_gradients(
    models: dict[str, Path], data: Path, tmp_path: Path, name: str, flags: str
) -> None:
    one_batch = train(models[name], data, tmp_path / "8x1", 8, 1, *flags.split())
    micro_batches = train(models[name], data, tmp_path / "1x8", 1, 8, *flags.split())
    assert micro_batches.losses() == pytest.approx(one_batch.losses(), rel=TOLERANCE)
    assert [row["tokens"] for row in micro_batches.rows] == [row["tokens"] for row in one_batch.rows]
    assert one_batch.gradients[0].keys() == {key for key, p in one_batch.model.named_parameters() if p.requires_grad}
    for tolerance, ours, theirs in zip(
        (TOLERANCE, SECOND_TOLERANCE), micro_batches.gradients, one_batch.gradients, strict=True
    ):
        assert ours.keys() == theirs.keys()
        for key, gradient in ours.items():
            assert relative_difference(gradient, theirs[key]) < tolerance, key
    # The comparison is meaningful: in the second step no gradient is zero or equal to the first step's.
    first, second = one_batch.gradients
    assert all(gradient.norm() > 0 and not torch.equal(gradient, first[key]) for key, gradient in second.items())


@pytest.mark.parametrize("loss", ["lean", "full_logits"])
@pytest.mark.parametrize("name", ["qwen", "qwen2"])
def test_weighted_loss_is_the_weighted_mean_over_the_targets(
    models: dict[str, Path], tmp_path: Path, name: str, loss: str
) -> None:
    data = weigh_answers(write_conversations(tmp_path / "train.json"))
    examples = encode(models[name], data, "assistant")
    network = load_model(load_checkpoint(str(models[name])), torch.float32)
    total = 0.0
    for example in examples:
        with torch.no_grad():
            logits = network(torch.tensor([example["input_ids"]])).logits[0]
        losses = F.cross_entropy(logits[:-1], torch.tensor(example["labels"][1:]), reduction="none")
        total += (losses * torch.tensor(example["loss_weights"][1:])).sum().item()
    weights = [weight for example in examples for weight in example["loss_weights"][1:]]
    assert set(weights) == {0, 0.25, 0.5, 1, 3}

    one_batch = train(models[name], data, tmp_path / "8x1", 8, 1, "--loss", loss)
    micro_batches = train(models[name], data, tmp_path / "1x8", 1, 8, "--loss", loss)
    assert one_batch.losses()[0] == pytest.approx(total / sum(weights), rel=TOLERANCE)
    assert micro_batches.losses() == pytest.approx(one_batch.losses(), rel=TOLERANCE)
    assert one_batch.rows[0]["tokens"] == sum(len(targets(example)) for example in examples)
    for key, gradient in one_batch.gradients[0].items():
        assert relative_difference(micro_batches.gradients[0][key], gradient) < TOLERANCE, key


@pytest.mark.parametrize("label_mask", ["assistant", "qwen"])
@pytest.mark.parametrize("name", ["qwen", "qwen2"])
def test_loss_is_the_mean_over_the_targets(models: dict[str, Path], tmp_path: Path, name: str, label_mask: str) -> None:
    """All eight conversations are in one step, so their order does not matter."""
    data = write_conversations(tmp_path / "train.json")
    examples = encode(models[name], data, label_mask)
    # The original's labels start with <|im_start|>, which nothing predicts.
    assert all((example["labels"][0] != -100) == (label_mask == "qwen") for example in examples)
    count = sum(len(targets(example)) for example in examples)
    run = train(models[name], data, tmp_path / "2x4", 2, 4, "--label_mask", label_mask)
    assert run.losses()[0] == pytest.approx(sum(losses_of(models[name], examples)) / count, rel=TOLERANCE)
    assert [row["tokens"] for row in run.rows] == [count, 2 * count]


def test_smaller_last_step_is_averaged_over_its_own_targets(tmp_path: Path) -> None:
    """Eight conversations in steps of three: the last step has two."""
    data = write_conversations(tmp_path / "train.json")
    examples = encode(TINY, data, "assistant")
    runs = [
        finetune_here(
            "--model_name_or_path", TINY, "--data_path", data, "--output_dir", tmp_path / str(batch),
            "--num_train_epochs", 1, "--per_device_train_batch_size", batch, "--learning_rate", 1e-9,
            "--gradient_accumulation_steps", 3 // batch, "--logging_steps", 1, "--save_strategy", "no",
        )
        for batch in (3, 1)
    ]  # fmt: skip
    sums = list(losses_of(TINY, examples))
    for run in runs:
        tokens = [0, *(row["tokens"] for row in run.rows)]
        assert tokens[-1] == sum(len(targets(example)) for example in examples)
        steps = [loss * (end - start) for loss, start, end in zip(run.losses(), tokens, tokens[1:], strict=False)]
        assert len(steps) == 3
        assert sum(steps) == pytest.approx(sum(sums), rel=1e-5)
    assert runs[1].losses() == pytest.approx(runs[0].losses(), rel=TOLERANCE)
