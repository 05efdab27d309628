"""A thin Trainer: the loss of a step is weighted by the targets really used, what a run says of itself costs one read
of the device per optimizer step, and checkpoints are ours."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from chat.label_mask import IGNORE_INDEX
from errors import RunError
from loading.checkpoint import Checkpoint
from training.callbacks import LogLines, ProgressBar
from training.distributed.heartbeat import RankStatus
from training.distributed.world import World
from training.progress import Counts, peak_memory
from training.run_folder.manifest import write_manifest
from training.run_folder.output import TRAINER_STATE
from training.run_folder.saving import save_model
from training.run_folder.staging import saving_errors, staged_checkpoint
from training.samplers import EpochSampler, PaddedDataset, as_given, by_source, grouped, mixed
from training.signals import Signals, StopRequest
from training.trainer_resume import ResumingTrainer, remove_superseded

logger = logging.getLogger(__name__)

_NAMED_PLACES = 20


class QwenTrainer(ResumingTrainer):
    """transformers' Trainer for causal language models.

    What the host reads from the device: after the backward passes of an optimizer step and before its update, one
    tensor with the loss, the gradient's norm and the counts of all processes (``_read_step``). The log lines are made
    of these numbers. With ``--fp16`` the gradient scaler reads once more, whether a gradient overflowed.

    Args:
        checkpoint: the base that is tuned; tokenizer, precision and generation config of what is saved come from it.
        loss: ``lean`` lets the model compute the loss without logits, ``full_logits`` with them.
        data_mixing: ``mixed`` draws examples as ``train_sampling_strategy`` says, ``sequential`` source by source.
        facts: what checkpoints say of the run, see ``training.run_folder.changes``.
        signals: where the process notes what it is asked for.
        pulse: where it notes how far it is.
        world: the processes of the run; by default this one alone.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        loss: str = "lean",
        data_mixing: str = "mixed",
        facts: Mapping[str, Any] | None = None,
        signals: Signals | None = None,
        pulse: RankStatus | None = None,
        world: World | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(processing_class=checkpoint.tokenizer, **kwargs)
        self.facts, self.signals = facts or {}, signals or Signals()
        self.pulse, self.world = pulse or RankStatus(), world or World()
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
        self.window = Counts()  # since the last log line
        self._started = self.window_started = time.monotonic()
        self._steps_done = 0  # in this process: a resumed run has done others before
        # Of the optimizer step at hand and of the evaluation at hand, on the device; this process's share.
        self._correct = torch.zeros((), dtype=torch.long, device=self.args.device)
        self._evaluated = torch.zeros(4, device=self.args.device)  # summed loss, its weight, correct, targets
        self._losses: list[Tensor] = []
        self._batches: list[list[int]] = []
        self._counts: list[Tensor | int] = []
        self._staging: Path | None = None
        self._order: EpochSampler | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._started = self.window_started = time.monotonic()
        return super().train(*args, **kwargs)

    # Batches

    def _get_collator_with_removed_columns(
        self, data_collator: Callable[..., Any], description: str | None = None
    ) -> Callable[..., Any]:
        """The collator as it is: it picks the keys it knows, and ``index`` is no argument of the model."""
        return data_collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        examples: Any = self.train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        strategy = self.args.train_sampling_strategy
        if self.data_mixing == "sequential":
            order = by_source(examples.source_sizes)
        elif strategy == "random":
            order = mixed(len(examples))
        elif strategy == "sequential":
            order = as_given(len(examples))
        elif strategy == "group_by_length":
            order = grouped(examples.lengths, batch)
        else:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._order = EpochSampler(order, len(examples), seed, filled=len(train_dataset or examples))
        return self._order

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader[Any]:
        """PaddedDataset up with blanks so that all processes get as many: else the first examples would count twice."""
        if self.args.world_size > 1 and not (is_training and self.args.dataloader_drop_last):
            dataset = PaddedDataset(dataset, self.args.world_size * batch_size, self.checkpoint.end_ids[-1])
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A dataloader that skips what a resumed run has seen does not tell the sampler.
        if self._order is not None:
            self._order.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

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
        self.pulse.advance(self.pulse.phase)  # before what waits for the other processes
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
        self.pulse.advance(self.pulse.phase)
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
        norm_or_none = math.nan if norm is None else norm
        mine: list[Any] = [sum(self._losses), self._correct, *self._counts, norm_or_none, self.signals.wish]
        values = torch.stack([torch.as_tensor(value, device=self.args.device).to(dtype) for value in mine])
        rows = self.accelerator.gather(values[None]).tolist()
        losses, correct, targets, tokens, slots, norms, wishes = zip(*rows, strict=True)
        self.signals.agree(wishes)
        if not all(map(math.isfinite, losses)):
            raise self.diverged("loss", next(loss for loss in losses if not math.isfinite(loss)))
        # A scaler leaves out the update when a gradient overflows, and tries a smaller scale: that is no fault.
        scales = self.accelerator.scaler is not None or (self.is_deepspeed_enabled and self.args.fp16)
        if norm is not None and not scales and not math.isfinite(norms[0]):
            raise self.diverged("gradient norm", norms[0])
        # Each process's loss is its part of the mean, times the processes.
        step = Counts(1, sum(losses) / len(losses), *(int(sum(each)) for each in (correct, targets, tokens, slots)))
        if self.state.global_step == 0:
            self._check_first_loss(step.loss)
        self.window.add(step)
        self.total.add(step)
        self._steps_done += 1
        return None if norm is None else norms[0]

    def diverged(self, what: str, value: float) -> RunError:
        """The error of a loss or gradient that is no number, with the places of the samples that it may come from."""
        examples: Any = self.train_dataset
        if self.is_deepspeed_enabled and what == "loss":  # found before the backward pass, by this process alone
            culprits = self._batches[len(self._losses)]
            used = "the step changed nothing"
        else:
            culprits = [
                index
                for loss, indices in zip(self._losses, self._batches, strict=True)
                for index in indices
                if what != "loss" or not math.isfinite(loss)
            ]
            used = "DeepSpeed has used it" if self.is_deepspeed_enabled else "the step changed nothing"
        places = [examples.where(index) for index in culprits]
        if self.args.world_size > 1 and not (self.is_deepspeed_enabled and what == "loss"):
            places = gather_object(places)
        more = f" and {len(places) - _NAMED_PLACES} more" if len(places) > _NAMED_PLACES else ""
        return RunError(
            f"Optimizer step {self.state.global_step + 1}: the {what} is {value}, and {used}; "
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
        if self.control.should_log and self.window.steps:
            tr_loss.zero_()
            self._total_loss_scalar += self.window.loss
            self._globalstep_last_logged = self.state.global_step
            self.log(self._describe_window(grad_norm, learning_rate), start_time)
        started = time.monotonic()
        self.control.should_save |= self.signals.agreed is not StopRequest.NOTHING
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )
        self.signals.end_if_asked()
        self.window_started += time.monotonic() - started  # tokens/s are those of training

    def _describe_window(self, grad_norm: Any, learning_rate: float | None) -> dict[str, float]:
        """What is logged of the steps since the last line, and a new window."""
        window, now = self.window, time.monotonic()
        peaks = peak_memory()
        per_step = (now - self._started) / max(1, self._steps_done)
        logs = {
            "loss": window.loss / window.steps,
            "token_accuracy": round(window.token_accuracy, 6),
            "learning_rate": self._get_learning_rate() if learning_rate is None else learning_rate,
            **({} if grad_norm is None else {"grad_norm": float(grad_norm)}),
            "tokens_per_second": round(window.targets / (now - self.window_started), 1),
            "padding": round(window.padding, 4),
            "peak_memory_gib": peaks.get("gpu_gib", peaks["cpu_gib"]),
            "eta_seconds": round(per_step * (self.state.max_steps - self.state.global_step), 1),
        }
        self.window, self.window_started = Counts(), now
        return logs

    # Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """transformers' loop; its loss is the mean over targets, as in training, not over batches.

        Training's random numbers are the same with and without it.
        """
        self._evaluated.zero_()
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
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
        with saving_errors(output), staged_checkpoint(final, writes) as staged:
            self.world.wait("checkpoint")  # no collective: a large one may take longer than its time-out
            self._staging = staged.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(final)
                if writes:
                    self.state.save_to_json(str(staged / TRAINER_STATE))
            self.world.wait("checkpoint")
            if writes:
                write_manifest(staged, self.state.global_step, self.facts)
            self.world.wait("checkpoint")
        if writes:
            # transformers' own rotation saw the hidden folder only.
            remove_superseded(final, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            folder = str(output_dir or self.args.output_dir)
            exact = self._staging is not None  # what a run goes on from
            save_model(model, self.checkpoint, folder, state_dict, not self.args.disable_tqdm, exact)


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
