"""A thin Trainer: the loss of a step is weighted by the targets really used, what a run says of itself costs one read
of the device per optimizer step, and checkpoints are ours."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, rotate_checkpoints

from data_utils.dataset import ExampleSet
from errors import RunError
from qwen_model.chatml import IGNORE_INDEX
from training.callbacks import LogLines, ProgressBar, peak_memory
from training.counts import Counts
from training.loading import Checkpoint
from training.output import TRAINER_STATE, saving_to, staged_checkpoint
from training.saving import save_model

logger = logging.getLogger(__name__)

_NAMED_PLACES = 20


class QwenTrainer(Trainer):
    """transformers' Trainer for causal language models.

    What the host reads from the device: after the backward passes of an optimizer step and before its update, one
    tensor with the loss, the gradient's norm and the counts of all processes (``_read_step``). The log lines are made
    of these numbers. With ``--fp16`` the gradient scaler reads once more, whether a gradient overflowed.

    Args:
        checkpoint: the base that is tuned; tokenizer, precision and generation config of what is saved come from it.
        loss: ``lean`` lets the model compute the loss without logits, ``full_logits`` with them.
        data_mixing: ``mixed`` draws examples as ``train_sampling_strategy`` says, ``sequential`` source by source.
    """

    def __init__(self, checkpoint: Checkpoint, loss: str = "lean", data_mixing: str = "mixed", **kwargs: Any) -> None:
        super().__init__(processing_class=checkpoint.tokenizer, **kwargs)
        self.checkpoint = checkpoint
        self.data_mixing = data_mixing
        self.label_names = ["labels"]  # transformers takes every argument of forward that has the word in it
        self.is_lean = loss == "lean"
        if self.is_lean:
            self.label_smoother = None  # it needs logits; the model smoothes by itself
        # transformers would look at every micro-batch's loss to leave out what is no number; here that ends the run.
        self.args.logging_nan_inf_filter = False
        for theirs in (PrinterCallback, ProgressCallback):
            self.remove_callback(theirs)
        self.add_callback(LogLines if self.args.disable_tqdm else ProgressBar)
        self.total = Counts()  # since the start of the run
        self._window = Counts()  # since the last log line
        self._started = self._window_started = time.monotonic()
        self._steps_done = 0  # in this process: a resumed run has done others before
        # Of the optimizer step at hand and of the evaluation at hand, on the device; this process's share.
        self._correct = torch.zeros((), dtype=torch.long, device=self.args.device)
        self._evaluated = torch.zeros(4, device=self.args.device)  # summed loss, its weight, correct, targets
        self._losses: list[Tensor] = []
        self._batches: list[list[int]] = []
        self._counts: list[Tensor | int] = []
        self._staging: Path | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._started = self._window_started = time.monotonic()
        return super().train(*args, **kwargs)

    # Batches

    def _get_collator_with_removed_columns(
        self, data_collator: Callable[..., Any], description: str | None = None
    ) -> Callable[..., Any]:
        """The collator as it is: it picks the keys it knows, and ``index`` is no argument of the model."""
        return data_collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        examples: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.data_mixing == "sequential":
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return SequentialSources(examples.source_sizes, seed)
        return super()._get_train_sampler(train_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Filled up with blank examples so that all processes get as many: else the first ones would count twice."""
        examples: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.args.world_size > 1 and isinstance(examples, ExampleSet):
            examples = _Filled(examples, self.args.world_size * self.args.eval_batch_size, self.checkpoint.end_ids[-1])
        return super().get_eval_dataloader(examples)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step; what is counted of them does not go to the model."""
        batches, weight = super().get_batch_samples(*args, **kwargs)
        self._losses = []
        self._correct.zero_()
        self._batches = [batch.pop("index", []) for batch in batches]
        self._counts = [
            sum(_count_targets(batch) for batch in batches),
            sum(batch["attention_mask"].sum() for batch in batches),
            sum(batch["input_ids"].numel() for batch in batches),
        ]
        return batches, weight

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """What the summed loss of an optimizer step is divided by: its targets, or their weights, over all processes.

        transformers decides by the name of the model's class whether labels are shifted; here they always are: the
        first token of a row is never a target.
        """
        weight = sum(_weigh_targets(batch).to(device) for batch in batch_samples)
        assert isinstance(weight, Tensor), "a step has at least one batch"
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            weight = self.accelerator.gather(weight).sum()
        return weight if weight.is_floating_point() else weight.clamp(min=1)  # without targets the loss is 0, not NaN

    # Loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        if model.training:
            # The collator pads on the right, where no real token looks. Without a mask attention takes its causal path,
            # and nobody has to read whether the mask hides anything.
            inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        if self.is_lean:
            inputs = {**inputs, "loss_only": True}
            if self.args.label_smoothing_factor:
                inputs["label_smoothing"] = self.args.label_smoothing_factor
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        correct = outputs["num_correct"] if self.is_lean else _count_correct(outputs["logits"], labels)
        if model.training:
            self._correct += correct
        else:
            self._evaluated[2] += correct
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        """Called once between the last backward pass of an optimizer step and its update."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._read_step(norm)

    def _read_step(self, norm: Tensor | float | None) -> float | None:
        """Read what this step was, over all processes, before it changes a parameter.

        Raises:
            RunError: the loss or the gradient is no number.
        """
        # float64 holds every count exactly; Apple's GPUs have none.
        dtype = torch.float32 if self.args.device.type == "mps" else torch.float64
        mine: list[Any] = [sum(self._losses), self._correct, *self._counts, math.nan if norm is None else norm]
        values = torch.stack([torch.as_tensor(value, device=self.args.device).to(dtype) for value in mine])
        rows = self.accelerator.gather(values[None]).tolist()
        losses, correct, targets, tokens, slots, norms = zip(*rows, strict=True)
        if not all(map(math.isfinite, losses)):
            raise self._diverged("loss", next(loss for loss in losses if not math.isfinite(loss)))
        # A scaler leaves out the update when a gradient overflows, and tries a smaller scale: that is no fault.
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(norms[0]):
            raise self._diverged("gradient norm", norms[0])
        # Each process's loss is its part of the mean, times the processes.
        step = Counts(1, sum(losses) / len(losses), *(int(sum(each)) for each in (correct, targets, tokens, slots)))
        if self.state.global_step == 0:
            self._check_first_loss(step.loss)
        self._window.add(step)
        self.total.add(step)
        self._steps_done += 1
        return None if norm is None else norms[0]

    def _diverged(self, what: str, value: float) -> RunError:
        """The error of a loss or gradient that is no number, with the places of the samples that it may come from."""
        culprits = [
            index
            for loss, indices in zip(self._losses, self._batches, strict=True)
            for index in indices
            if what != "loss" or not math.isfinite(loss)
        ]
        examples: Any = self.train_dataset
        places = [examples.where(index) for index in culprits]
        if self.args.world_size > 1:
            places = gather_object(places)
        more = f" and {len(places) - _NAMED_PLACES} more" if len(places) > _NAMED_PLACES else ""
        return RunError(
            f"Optimizer step {self.state.global_step + 1}: the {what} is {value}, and the step changed nothing; "
            f"its samples: {', '.join(places[:_NAMED_PLACES])}{more}",
            f"Look at these samples, or lower --learning_rate {self.args.learning_rate:g}",
        )

    def _check_first_loss(self, loss: float) -> None:
        model: Any = self.model
        vocabulary = model.config.vocab_size
        limit = math.log(vocabulary) + 1
        if loss > limit:
            logger.warning(
                "The first loss is %.2f, above ln(vocabulary) + 1 = %.2f: guessing among %s tokens would do better. "
                "The data or the tokenizer does not fit the model",
                loss, limit, f"{vocabulary:,}",
            )  # fmt: skip

    # Log

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Tensor | float | None,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """transformers' own, but the log line is made of what ``_read_step`` has read already."""
        if self.control.should_log and self._window.steps:
            tr_loss.zero_()
            self._total_loss_scalar += self._window.loss
            self._globalstep_last_logged = self.state.global_step
            self.log(self._describe_window(grad_norm, learning_rate), start_time)
        started = time.monotonic()
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )
        self._window_started += time.monotonic() - started  # tokens/s are those of training

    def _describe_window(self, grad_norm: Any, learning_rate: float | None) -> dict[str, float]:
        """What is logged of the steps since the last line, and a new window."""
        window, now = self._window, time.monotonic()
        peaks = peak_memory()
        per_step = (now - self._started) / self._steps_done
        logs = {
            "loss": window.loss / window.steps,
            "token_accuracy": round(window.token_accuracy, 6),
            "learning_rate": self._get_learning_rate() if learning_rate is None else learning_rate,
            **({} if grad_norm is None else {"grad_norm": float(grad_norm)}),
            "tokens_per_second": round(window.targets / (now - self._window_started), 1),
            "padding": round(window.padding, 4),
            "peak_memory_gib": peaks.get("gpu_gib", peaks["cpu_gib"]),
            "eta_seconds": round(per_step * (self.state.max_steps - self.state.global_step), 1),
        }
        self._window, self._window_started = Counts(), now
        return logs

    # Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """transformers' loop; its loss is the mean over targets, as in training, not over batches."""
        self._evaluated.zero_()
        output = super().evaluation_loop(*args, **kwargs)
        total, weight, correct, targets = self.accelerator.reduce(self._evaluated, reduction="sum").tolist()
        assert output.metrics is not None, "the loop always reports"
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = total / weight if weight else 0.0
        output.metrics[f"{prefix}_token_accuracy"] = round(correct / max(targets, 1), 6)
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs.pop("index", None)
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        assert loss is not None, "examples have labels"
        # The loss is this process's sum over the targets of all processes' batches, times the processes.
        scale = self._get_num_items_in_batch([inputs], loss.device) / self.args.world_size
        self._evaluated[0] += loss.detach() * scale
        self._evaluated[1] += _weigh_targets(inputs).to(loss.device)
        self._evaluated[3] += _count_targets(inputs).to(loss.device)
        return loss, logits, labels

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """transformers' ``checkpoint-N``, whole or not at all: filled in a hidden folder, moved when all are done."""
        output, writes = Path(str(self.args.output_dir)), self.args.should_save
        final = output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with saving_to(output), staged_checkpoint(final, writes) as staged:
            self.accelerator.wait_for_everyone()
            self._staging = staged.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(final)
                if writes:
                    self.state.save_to_json(str(staged / TRAINER_STATE))
            self.accelerator.wait_for_everyone()
        if writes:
            # transformers' own rotation saw the hidden folder only.
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(output), limit, best, use_mtime=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            folder = str(output_dir or self.args.output_dir)
            save_model(model, self.checkpoint, folder, state_dict, show_progress=not self.args.disable_tqdm)


class SequentialSources(Sampler[int]):
    """Every source's examples before those of the next, each source shuffled anew in every epoch.

    Args:
        sizes: examples of each source, in the order in which they stand in the dataset.
    """

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        self.sizes, self.seed, self.epoch = list(sizes), seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        start = 0
        for size in self.sizes:
            yield from (start + torch.randperm(size, generator=generator)).tolist()
            start += size


class _Filled(Dataset[Any]):
    """Examples, and behind them blank ones up to a multiple: a token that is no target, so no figure changes."""

    def __init__(self, examples: ExampleSet, multiple: int, token: int) -> None:
        self.examples = examples
        self.length = math.ceil(len(examples) / multiple) * multiple
        self.blank = {"input_ids": [token], "labels": [IGNORE_INDEX]}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.examples[index] if index < len(self.examples) else self.blank


def _count_targets(batch: dict[str, Any]) -> Tensor:
    return (batch["labels"][:, 1:] != IGNORE_INDEX).sum()


def _weigh_targets(batch: dict[str, Any]) -> Tensor:
    """The targets' ``loss_weights``, where the batch has them, else their number."""
    if (weights := batch.get("loss_weights")) is None:
        return _count_targets(batch)
    return weights[:, 1:].masked_fill(batch["labels"][:, 1:] == IGNORE_INDEX, 0).sum()


def _count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Targets whose most likely token is right. ``logits`` [B, T, V], ``labels`` [B, T], not shifted."""
    targets = labels[:, 1:].to(logits.device)
    return ((logits[:, :-1].argmax(-1) == targets) & (targets != IGNORE_INDEX)).sum()
