"""Loss, counts and log lines of training steps and evaluations, and runs that end early."""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerState

from errors import RunError
from loading.checkpoint import load_checkpoint
from tests.commands import PLAIN, finetune_here
from tests.models import TINY, write_conversations, write_later_checkpoint
from training.config.parsing import parse_args
from training.data import build_collator, build_train_dataset, load_data
from training.display import LogLines, ProgressBar, describe_logs
from training.model import load_training_model
from training.trainer import QwenTrainer
from training.training_arguments import build_training_arguments

LOGGED = {
    "loss", "token_accuracy", "learning_rate", "grad_norm", "tokens_per_second", "padding", "peak_memory_gib",
    "eta_seconds", "epoch",
}  # fmt: skip
VOCABULARY = 960


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight ragged conversations, one per line."""
    folder = tmp_path_factory.mktemp("data")
    records = write_conversations(folder / "train.json").read_text(encoding="utf-8")
    path = folder / "train.jsonl"
    path.write_text(records[1:-1].replace('}, {"conversations"', '}\n{"conversations"') + "\n", encoding="utf-8")
    assert len(path.read_text(encoding="utf-8").splitlines()) == 8
    return path


def build_trainer(data: Path, output: Path, *flags: object, model: Path = TINY) -> QwenTrainer:
    """Return a trainer as ``finetune.py`` builds it, with SGD, a constant learning rate and examples in order."""
    argv = [
        *PLAIN, "--model_name_or_path", model, "--data_path", data, "--output_dir", output, "--use_cpu", "True",
        "--disable_tqdm", "True", "--optim", "sgd", "--learning_rate", 1e-9, "--lr_scheduler_type", "constant",
        "--logging_steps", 1, "--save_strategy", "no", "--train_sampling_strategy", "sequential",
        "--model_max_length", 64, *flags,
    ]  # fmt: skip
    args = parse_args([str(each) for each in argv])
    checkpoint = load_checkpoint(str(model))
    training_arguments = build_training_arguments(args)
    sets = load_data(args, training_arguments, checkpoint)
    return QwenTrainer(
        checkpoint,
        loss=args.model.loss,
        data_mixing=args.data.data_mixing,
        model=load_training_model(checkpoint, args, training_arguments),
        args=training_arguments,
        data_collator=build_collator(args, checkpoint),
        train_dataset=build_train_dataset(args, checkpoint, sets["train"]),
        eval_dataset=sets.get("eval"),
    )


def logs_of(trainer: QwenTrainer) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if "loss" in row]


def logits_of(trainer: QwenTrainer, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and targets of an example's supervised positions, without padding."""
    model: Any = trainer.model
    dataset: Any = trainer.train_dataset
    example = dataset[index]
    labels = torch.tensor(example["labels"][1:])
    with torch.no_grad():
        logits = model.eval()(torch.tensor([example["input_ids"]])).logits[0, :-1]
    return logits[labels != -100], labels[labels != -100]


def make_some_targets_right(trainer: QwenTrainer) -> None:
    """Copy the hidden states before some targets into the head: a random model predicts none of them."""
    model: Any = trainer.model
    dataset: Any = trainer.train_dataset
    for index in (1, 4, 6):
        example = dataset[index]
        labels = torch.tensor(example["labels"][1:])
        with torch.no_grad():
            hidden = model.eval().transformer(torch.tensor([example["input_ids"]])).last_hidden_state[0, :-1]
            position = int((labels != -100).nonzero()[2])
            model.lm_head.weight[labels[position]] = hidden[position]


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("loss", ["lean", "full_logits"])
def test_token_accuracy_is_a_share_of_the_step_s_targets(data: Path, tmp_path: Path, loss: str, batch: int) -> None:
    trainer = build_trainer(
        data, tmp_path, "--loss", loss, "--per_device_train_batch_size", batch,
        "--gradient_accumulation_steps", 4 // batch, "--num_train_epochs", 1,
    )  # fmt: skip
    make_some_targets_right(trainer)
    expected = []
    for step in (range(4), range(4, 8)):
        logits, targets = map(torch.cat, zip(*(logits_of(trainer, index) for index in step), strict=True))
        correct = int((logits.argmax(-1) == targets).sum())
        expected.append((F.cross_entropy(logits, targets).item(), correct / len(targets)))
    assert 0 < expected[0][1] < expected[1][1] < 1
    trainer.train()
    rows = logs_of(trainer)
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [row["token_accuracy"] for row in rows] == pytest.approx([share for _, share in expected], abs=1e-6)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_lean_and_full_loss_log_the_same_for_later_families(data: Path, tmp_path: Path, model_type: str) -> None:
    model = write_later_checkpoint(tmp_path / "model", model_type)
    rows = []
    for loss in ("lean", "full_logits"):
        trainer = build_trainer(data, tmp_path / loss, "--loss", loss, "--num_train_epochs", 1, model=model)
        trainer.train()
        rows.append([(row["loss"], row["token_accuracy"]) for row in logs_of(trainer)])
    assert rows[0] == [(pytest.approx(loss, rel=1e-5), share) for loss, share in rows[1]]


def test_log_line_covers_the_steps_since_the_last_one(data: Path, tmp_path: Path) -> None:
    flags = ("--per_device_train_batch_size", 2, "--num_train_epochs", 1, "--padding_free", False)
    single, double = build_trainer(data, tmp_path / "1", *flags), build_trainer(data, tmp_path / "2", *flags)
    double.args.logging_steps = 2
    for trainer in (single, double):
        make_some_targets_right(trainer)
        trainer.train()
    ones, twos = logs_of(single), logs_of(double)
    assert [row["step"] for row in twos] == [2, 4]
    assert all(row.keys() == {*LOGGED, "step"} for row in [*ones, *twos])
    counts = [sum(len(logits_of(single, index)[1]) for index in range(at, at + 2)) for at in range(0, 8, 2)]
    for row, first, a, b in zip(twos, ones[::2], (0, 2), (1, 3), strict=True):
        assert row["loss"] == pytest.approx((first["loss"] + ones[b]["loss"]) / 2, rel=1e-6)
        correct = ones[a]["token_accuracy"] * counts[a] + ones[b]["token_accuracy"] * counts[b]
        assert row["token_accuracy"] == pytest.approx(correct / (counts[a] + counts[b]), abs=1e-5)
    dataset: Any = single.train_dataset
    lengths = dataset.lengths
    expected = [1 - (lengths[at] + lengths[at + 1]) / (2 * max(lengths[at : at + 2])) for at in range(0, 8, 2)]
    assert [row["padding"] for row in ones] == pytest.approx(expected, abs=1e-4)
    assert single.progress.total.padding == double.progress.total.padding == pytest.approx(
        1 - sum(lengths) / sum(2 * max(lengths[at : at + 2]) for at in range(0, 8, 2))
    )  # fmt: skip
    assert ones[0]["eta_seconds"] >= ones[1]["eta_seconds"] >= ones[-1]["eta_seconds"] == 0  # steps take milliseconds
    assert all(row["tokens_per_second"] > 0 and 0.05 < row["peak_memory_gib"] < 64 for row in ones)


def test_label_smoothing_is_passed_to_the_model(data: Path, tmp_path: Path) -> None:
    trainer = build_trainer(
        data, tmp_path, "--label_smoothing_factor", 0.2, "--per_device_train_batch_size", 8, "--max_steps", 1
    )
    logits, targets = map(torch.cat, zip(*(logits_of(trainer, index) for index in range(8)), strict=True))
    trainer.train()
    expected = F.cross_entropy(logits, targets, label_smoothing=0.2).item()
    assert logs_of(trainer)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_loss_weights_are_normalised_over_the_step(data: Path, tmp_path: Path) -> None:
    """Each token in the second half of the conversations has a tenth of the weight of the others."""
    trainer = build_trainer(data, tmp_path, "--gradient_accumulation_steps", 8, "--max_steps", 1)
    collate: Any = trainer.data_collator

    def weigh(examples: Any) -> dict[str, Any]:
        batch = collate(examples)
        weights = [w for each in examples for w in [0.01 if each["index"] < 4 else 0.001] * len(each["input_ids"])]
        return {**batch, "loss_weights": torch.tensor([weights])}

    trainer.data_collator = weigh
    parts = [logits_of(trainer, index) for index in range(8)]
    sums = [F.cross_entropy(*part, reduction="sum").item() for part in parts]
    counts = [len(targets) for _, targets in parts]
    trainer.train()
    expected = (10 * sum(sums[:4]) + sum(sums[4:])) / (10 * sum(counts[:4]) + sum(counts[4:]))
    assert logs_of(trainer)[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.progress.total.targets == sum(counts)


def test_evaluation_reports_loss_and_token_accuracy(data: Path, tmp_path: Path) -> None:
    trainer = build_trainer(data, tmp_path, "--eval_data_path", data, "--per_device_eval_batch_size", 3)
    make_some_targets_right(trainer)
    logits, targets = map(torch.cat, zip(*(logits_of(trainer, index) for index in range(8)), strict=True))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    correct = int((logits.argmax(-1) == targets).sum())
    assert metrics["eval_token_accuracy"] == pytest.approx(correct / len(targets), abs=1e-6) and correct > 2


def poison(trainer: QwenTrainer, row: int, value: float) -> None:
    model: Any = trainer.model
    with torch.no_grad():
        model.transformer.wte.weight[row] = value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_stops_before_the_update(data: Path, tmp_path: Path, value: float) -> None:
    """A token of the sixth conversation only has a non-finite embedding. Steps have two conversations."""
    trainer = build_trainer(
        data, tmp_path, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2,
        "--learning_rate", 0.1, "--num_train_epochs", 1,
    )  # fmt: skip
    dataset: Any = trainer.train_dataset
    others = {token for index in range(8) if index != 5 for token in dataset[index]["input_ids"]}
    poison(trainer, next(token for token in dataset[5]["input_ids"] if token not in others), value)
    model: Any = trainer.model
    before: list[dict[str, torch.Tensor]] = []
    original = trainer.callback_handler.on_step_end

    def on_step_end(*args: Any, **kwargs: Any) -> Any:
        before.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return original(*args, **kwargs)

    trainer.callback_handler.on_step_end = on_step_end
    with pytest.raises(RunError) as stopped:
        trainer.train()
    assert str(stopped.value) == (
        f"Optimizer step 3: the loss is nan, and the step changed nothing; its samples: {data}:6. "
        "Check these samples, or lower --learning_rate 0.1"
    )
    assert len(before) == trainer.state.global_step == 2
    after = model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before[-1].items())
    assert not torch.equal(before[0]["lm_head.weight"], before[1]["lm_head.weight"])


def test_a_non_finite_gradient_stops_before_the_update(data: Path, tmp_path: Path) -> None:
    """The loss is finite, but one gradient overflows."""
    trainer = build_trainer(data, tmp_path, "--per_device_train_batch_size", 2, "--max_steps", 2)
    model: Any = trainer.model
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(RunError) as stopped:
        trainer.train()
    assert str(stopped.value).startswith(
        f"Optimizer step 1: the gradient norm is inf, and the step changed nothing; its samples: {data}:1, {data}:2. "
    )
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def warnings_of_first_step(data: Path, output: Path, caplog: pytest.LogCaptureFixture, scale: float) -> list[str]:
    trainer = build_trainer(data, output, "--per_device_train_batch_size", 4, "--max_steps", 2)
    model: Any = trainer.model
    with torch.no_grad():
        model.lm_head.weight *= scale
    caplog.clear()
    with caplog.at_level(logging.WARNING, "training"):
        trainer.train()
    return [record.getMessage() for record in caplog.records if "first loss" in record.getMessage()]


def test_an_infinite_evaluation_loss_does_not_end_a_run_under_deepspeed(data: Path, tmp_path: Path) -> None:
    """Only the loss of training is checked before DeepSpeed uses it."""
    trainer = build_trainer(data, tmp_path, "--max_steps", 1)
    trainer.train()
    model: Any = trainer.model
    model.lm_head.weight.data.fill_(math.nan)
    trainer.is_deepspeed_enabled = True
    examples: Any = trainer.train_dataset
    batch = trainer.data_collator([examples[0]])
    batch.pop("index", None)
    assert math.isnan(trainer.compute_loss(model.eval(), batch))
    trainer._losses = []
    with pytest.raises(RunError, match="Optimizer step 2: the loss is nan"):
        trainer.compute_loss(model.train(), batch)


def test_a_first_loss_worse_than_guessing_is_warned_about(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings_of_first_step(data, tmp_path / "fits", caplog, 1) == []
    [warning] = warnings_of_first_step(data, tmp_path / "other", caplog, 20)
    assert f"above ln(vocabulary) + 1 = {math.log(VOCABULARY) + 1:.2f}" in warning and "960 tokens" in warning
    assert float(warning.split("The first loss is ")[1].split(",")[0]) > math.log(VOCABULARY) + 1


class Reads(TorchDispatchMode):
    """Count reads of tensor values by file; ``tolist``, which ``_read_step`` uses, is not dispatched here."""

    def __init__(self) -> None:
        super().__init__()
        self.files: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero"):
            frame: Any = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            self.files["/".join(Path(frame.f_code.co_filename).parts[-2:])] += 1
        return func(*args, **(kwargs or {}))


def test_the_trainer_reads_the_device_once_per_step(data: Path, tmp_path: Path) -> None:
    """transformers itself reads once, when training ends."""
    trainer = build_trainer(
        data, tmp_path, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4, "--num_train_epochs", 3
    )
    with Reads() as reads:
        trainer.train()
    assert len(logs_of(trainer)) == 6
    ours = {name: count for name, count in reads.files.items() if "trainer" in name or name.startswith("training/")}
    assert ours == {"transformers/trainer.py": 1}


def test_format_of_log_lines(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logs = {
        "loss": 1.23456789, "token_accuracy": 0.7134, "learning_rate": 2.99e-4, "grad_norm": 0.53219,
        "tokens_per_second": 12345.6, "padding": 0.1234, "peak_memory_gib": 3.219, "eta_seconds": 3723.4, "epoch": 0.5,
    }  # fmt: skip
    assert describe_logs(logs) == (
        "loss 1.2346, accuracy 71.3%, lr 2.99e-04, grad norm 0.532, 12,346 tokens/s, padding 12%, peak 3.2 GiB"
    )
    assert describe_logs({"train_runtime": 12.3, "total_flos": 1e15}) == ""
    trainer = build_trainer(data, tmp_path, "--eval_data_path", data)
    state = TrainerState(global_step=20, max_steps=300)
    with caplog.at_level(logging.INFO, "training"):
        lines = LogLines()
        for each in (logs, {"eval_loss": 1.5, "eval_token_accuracy": 0.5, "eval_runtime": 3.0}, {"train_runtime": 1.0}):
            lines.on_log(trainer.args, state, trainer.control, logs=each)
    assert [record.getMessage() for record in caplog.records if record.name == "training.display"] == [
        f"step 20/300: {describe_logs(logs)}, 1:02:03 left",
        "step 20/300: evaluation loss 1.5000, accuracy 50.0%",
    ]


def test_the_trainer_shows_its_steps_above_the_progress_bar(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = build_trainer(data, tmp_path, "--disable_tqdm", "False", "--num_train_epochs", 1)
    assert sum(isinstance(each, ProgressBar) for each in trainer.callback_handler.callbacks) == 1
    trainer.train()
    [row] = logs_of(trainer)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"step 1/1: {describe_logs(row)}\n" in captured.err and "1/1, 0:00:00 left" in captured.err
    assert "{'loss'" not in captured.err


def test_tensorboard_gets_all_logged_values(data: Path, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--eval_data_path", data, "--output_dir", tmp_path / "out",
        "--report_to", "tensorboard", "--max_steps", 2, "--logging_steps", 1, "--save_strategy", "no",
        "--eval_strategy", "epoch", "--per_device_train_batch_size", 4,
    )  # fmt: skip
    [file] = (tmp_path / "out").rglob("events.out.tfevents*")
    events = event_accumulator.EventAccumulator(str(file.parent))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {f"train/{name}" for name in LOGGED} | {"eval/loss", "eval/token_accuracy"}
    assert [event.step for event in events.Scalars("train/token_accuracy")] == [1, 2]


def test_early_stopping_by_token_accuracy(data: Path, tmp_path: Path) -> None:
    """The model does not change: the first evaluation is the best, and the run ends two evaluations later."""
    run = finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--eval_data_path", data, "--output_dir", tmp_path / "out",
        "--max_steps", 9, "--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", 1, "--save_steps", 1,
        "--load_best_model_at_end", "True", "--metric_for_best_model", "token_accuracy", "--learning_rate", 1e-9,
        "--early_stopping_patience", 2,
    )  # fmt: skip
    state = run.trainer_state
    assert (state.global_step, state.best_global_step) == (3, 1)
    assert [row["step"] for row in run.rows if "eval_token_accuracy" in row] == [1, 2, 3]


def test_sequential_mixing_trains_one_source_after_the_other(data: Path, tmp_path: Path) -> None:
    """Each epoch has a new order within each source; the same seed gives the same orders."""
    lines = data.read_text(encoding="utf-8").splitlines()
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("\n".join(lines[:5]), encoding="utf-8")
    two.write_text("\n".join(lines[5:]), encoding="utf-8")
    flags = ("--data_path", one, f"{two}@x2", "--data_mixing", "sequential", "--train_sampling_strategy", "random")
    seen: list[list[int]] = []
    for attempt in ("a", "b"):
        trainer = build_trainer(data, tmp_path / attempt, *flags, "--num_train_epochs", 2)
        indices: list[int] = []
        collate = trainer.data_collator

        def record(examples: Any, collate: Any = collate, indices: list[int] = indices) -> Any:
            indices += [example["index"] for example in examples]
            return collate(examples)

        trainer.data_collator = record
        trainer.train()
        seen.append(indices)
    assert seen[0] == seen[1]
    first, second = seen[0][:11], seen[0][11:]
    for epoch in (first, second):
        assert sorted(epoch[:5]) == [*range(5)]
        assert sorted(epoch[5:]) == [*range(5, 11)]
    assert first != second


def test_unused_evaluation_data_is_warned_about(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    message = "Evaluation data: 2 samples, but the run never evaluates. Give --eval_strategy"
    build_trainer(data, tmp_path, "--eval_split", 0.25)
    assert message in caplog.messages
    caplog.clear()
    build_trainer(data, tmp_path, "--eval_split", 0.25, "--eval_strategy", "epoch")
    assert message not in caplog.messages
