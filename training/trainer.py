"""transformers' Trainer for causal language models: batches, loss per token, one device read per step, evaluation.

Saving and resuming are in ``training/trainer_checkpoints.py``, memory that does not suffice in
``training/trainer_memory.py``. Every method of the Trainer that is overridden is in these three files and is listed in
``tests/unit/test_library_contract.py``.
"""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from errors import RunError
from loading.checkpoint import Checkpoint
from loading.sharding import gather
from qwen_model.sample_attention import ready_masks
from training.data_workers import worker_errors
from training.display import LogLines, ProgressBar
from training.distributed.heartbeat import RankStatus
from training.distributed.world import World
from training.first_loss import check_first_loss
from training.held_out import HeldOut, SampleFile, metrics_of
from training.joined_rows import is_empty, join_micro_batches
from training.learning_rates import raise_rate_of_second
from training.noise import embedding_noise
from training.ornaments import Ornaments
from training.progress import Counts, Progress, count_correct, count_targets, count_tokens, weigh_targets
from training.run_folder.curves import Row
from training.samplers import PaddedDataset, build_sampler
from training.signals import Signals, StopRequest
from training.trainer_engines import (
    complete_engine_options,
    enable_fsdp_on_cpu,
    keep_training_mode,
    skip_unused_deepspeed,
)
from training.trainer_memory import MemoryTrainer

logger = logging.getLogger(__name__)

_MAX_NAMED_SAMPLES = 20


class QwenTrainer(MemoryTrainer):
    """transformers' Trainer, with the same steps and the same files under every engine and after every resume.

    The host reads from the device once per optimizer step, between its backward passes and its update: one tensor with
    the loss, the gradient norm and the counts of all ranks (``_read_step``). The log lines are made of these numbers.
    With ``--fp16`` the gradient scaler reads once more, whether a gradient overflowed.

    Args:
        checkpoint: the base model's; what is saved takes its tokenizer, precision and generation config.
        loss: ``lean`` computes the loss without logits, ``full_logits`` with them.
        data_mixing: ``mixed`` draws examples by ``train_sampling_strategy``, ``sequential`` source by source.
        finds_batch_size: halve a micro-batch that does not fit, see ``MemoryTrainer``.
        facts: what checkpoints record of the run, see ``training.run_folder.changes``.
        progress: counts and times, shared with the run log.
        signals: requests to stop or save.
        status: this rank's status, which the other ranks watch.
        world: the ranks of the run; by default this one only.
        rate_ratio: LoRA+: the learning rate of an adapter's matrices B, divided by that of all other parameters.
        joins_rows: join the micro-batches of a step, which must be rows without padding, to longer rows.
        eval_sources: a name for each source of the evaluation data; the figures of several are also reported apart.
        held_out: the questions that are answered at each evaluation, if any, and the file of the answers.
    """

    progress: Progress
    signals: Signals
    status: RankStatus
    ornaments: Ornaments  # their end is the caller's, after the result is saved

    # This rank's share of the current optimizer step: a value per computed micro-batch, sums on the device.
    _losses: list[Tensor]
    _batch_indices: list[list[int]]  # of the examples
    _step_counts: list[Tensor | int]  # targets, tokens, slots, samples
    _step_correct: Tensor
    _operations_per_position: int | None = None
    # This rank's share of the current evaluation by source, on the device: summed loss, its weight, correct, targets.
    _evaluated: Tensor
    _source_ends: list[int]  # of the examples that are evaluated
    _source: int = 0  # of the batch that is evaluated: each has examples of one

    def __init__(
        self,
        checkpoint: Checkpoint,
        loss: str = "lean",
        data_mixing: str = "mixed",
        finds_batch_size: bool = False,
        facts: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        signals: Signals | None = None,
        status: RankStatus | None = None,
        world: World | None = None,
        rate_ratio: float = 1.0,
        joins_rows: bool = False,
        eval_sources: Sequence[str] = (),
        held_out: tuple[HeldOut, SampleFile] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(processing_class=checkpoint.tokenizer, **kwargs)
        self.checkpoint, self.data_mixing, self.facts = checkpoint, data_mixing, facts or {}
        self.finds_batch_size, self.joins_rows, self._budgets = finds_batch_size, joins_rows, {}
        self.progress, self.signals = progress or Progress(), signals or Signals()
        self.status, self.world = status or RankStatus(), world or World()
        self.label_names = ["labels"]  # by default every argument of forward whose name contains the word
        self.rate_ratio = rate_ratio
        self.neftune_noise_alpha = None  # transformers' noise takes a row for a sample; see train
        self.is_lean = loss == "lean"
        if self.is_lean:
            self.label_smoother = None  # it needs logits; the model smoothes by itself
        # transformers would read the loss of every micro-batch to replace NaN in the log; here NaN ends the run.
        self.args.logging_nan_inf_filter = False
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(LogLines() if self.args.disable_tqdm else ProgressBar(self.progress))
        self._losses, self._batch_indices, self._step_counts = [], [], []
        self._step_correct = torch.zeros((), dtype=torch.long, device=self.args.device)
        self.eval_sources, self.held_out = eval_sources, held_out
        self._source_ends, self._evaluated = [0], torch.zeros(1, 4, device=self.args.device)
        self.ornaments = Ornaments(self.callback_handler.callbacks)

    def create_accelerator_and_postprocess(self) -> None:
        skip_unused_deepspeed()
        complete_engine_options(self.args)
        super().create_accelerator_and_postprocess()
        enable_fsdp_on_cpu(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.progress.start()
        noise = embedding_noise(self.accelerator.unwrap_model(self.model), self.args.neftune_noise_alpha)
        with worker_errors(self.args.dataloader_num_workers), noise:
            return super().train(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.rate_ratio != 1:
            raise_rate_of_second(optimizer, model or self.model, self.rate_ratio)
        return optimizer

    # ------------------------------------------------------------------------------------------------------- batches

    def _get_collator_with_removed_columns(
        self, data_collator: Callable[..., Any], description: str | None = None
    ) -> Callable[..., Any]:
        """Return the collator unchanged: it picks its keys itself, and needs ``index``, which the model does not."""
        return data_collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        examples: Any = self.train_dataset
        self._sampler = build_sampler(self.args, self.data_mixing, examples, len(train_dataset or examples))
        return super()._get_train_sampler(train_dataset) if self._sampler is None else self._sampler

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader[Any]:
        """Pad the dataset so that all ranks get as many batches; accelerate would repeat the first examples.

        For evaluations each source is padded, so that batches have examples of one.
        """
        sizes = None if is_training else dataset.source_sizes
        if sizes is not None:
            self._source_ends = [*accumulate(sizes)]
        needs_padding = not (is_training and self.args.dataloader_drop_last)
        if (self.args.world_size > 1 and needs_padding) or (sizes and len(sizes) > 1 and batch_size > 1):
            multiple = self.args.world_size * batch_size
            dataset = PaddedDataset(dataset, multiple, self.checkpoint.end_ids[-1], sizes)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        """Return the micro-batches of an optimizer step, joined and counted, without what the model does not take."""
        batches, weight = super().get_batch_samples(*args, **kwargs)
        if self.joins_rows:
            batches = join_micro_batches(batches, self.joining().budget)
        computed = [batch for batch in batches if not is_empty(batch)]
        self._losses = []
        self._step_correct.zero_()
        self._batch_indices = [batch.pop("index", []) for batch in computed]
        self._step_counts = [
            sum(count_targets(batch) for batch in computed),
            sum(count_tokens(batch) for batch in computed),
            sum(batch["input_ids"].numel() for batch in computed),
            sum(map(len, self._batch_indices)),
        ]
        return batches, weight

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count nothing: ``_read_step`` does, once per step, without gathering and reading for every micro-batch."""

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Return the divisor of an optimizer step's summed loss: its targets, or their weights, over all ranks.

        transformers decides by the name of the model's class whether labels are shifted; here they always are: the
        first token of a row is never a target.
        """
        self.status.record_progress()  # before the gather, which waits for the other ranks
        weight = sum(weigh_targets(batch).to(device) for batch in batch_samples)
        assert isinstance(weight, Tensor), "a step has at least one batch"
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            weight = self.accelerator.gather(weight).sum()
        return weight if weight.is_floating_point() else weight.clamp(min=1)  # without targets the loss is 0, not NaN

    # --------------------------------------------------------------------------------------------------------- steps

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a micro-batch and count its correct targets.

        Raises:
            RunError: under DeepSpeed, the loss is NaN or infinite.
        """
        labels = inputs["labels"]
        if "attention_mask" in inputs:
            # Padding is on the right, where causal attention never looks from a real token.
            assert self.model is not None, "the Trainer has a model"
            inputs = {**inputs, "attention_mask": ready_masks(self.model.config)}
        if self.is_lean:
            inputs = {**inputs, "loss_only": True}
            if self.args.label_smoothing_factor:
                inputs["label_smoothing"] = self.args.label_smoothing_factor
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # DeepSpeed updates within the backward pass, before _read_step.
        if model.training and self.is_deepspeed_enabled and not math.isfinite(value := float(loss.detach())):
            raise self._divergence("loss", value)
        self.status.record_progress()
        correct = outputs["num_correct"] if self.is_lean else count_correct(outputs["logits"], labels)
        if model.training:
            self._step_correct += correct
        else:
            self._evaluated[self._source, 2] += correct
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if is_empty(inputs):  # its samples are in another row of the step
            return torch.zeros((), device=self.args.device)
        assert self.model is not None, "the Trainer has a model"
        keep_training_mode(model, self.model)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._losses.append(loss)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return transformers' estimate for a micro-batch, without counting the parameters each time."""
        if self._operations_per_position is None:
            one: dict[str, Any] = {"input_ids": inputs["input_ids"].new_zeros(1)}
            self._operations_per_position = super().floating_point_ops(one)
        return self._operations_per_position * int(inputs["input_ids"].numel())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        """Read the step; called once between the last backward pass of an optimizer step and its update."""
        return self._read_step(gather(super()._get_grad_norm(model, grad_norm=grad_norm)))

    def _read_step(self, norm: Tensor | float | None) -> float | None:
        """Read loss, counts and gradient norm of the step over all ranks, before it changes a parameter.

        Returns:
            The gradient norm.
        Raises:
            RunError: the loss or the gradient norm is NaN or infinite.
        """
        # float64 holds every count exactly; Apple's GPUs have none.
        dtype = torch.float32 if self.args.device.type == "mps" else torch.float64
        local: list[Any] = [
            sum(self._losses), self._step_correct, *self._step_counts, math.nan if norm is None else norm,
            self.signals.requested,
        ]  # fmt: skip
        values = torch.stack([torch.as_tensor(value, device=self.args.device).to(dtype) for value in local])
        rows = self.accelerator.gather(values[None]).tolist()
        losses, correct, targets, tokens, slots, samples, norms, requests = zip(*rows, strict=True)
        self.signals.agree(requests)
        if not all(map(math.isfinite, losses)):
            raise self._divergence("loss", next(loss for loss in losses if not math.isfinite(loss)))
        # A gradient scaler skips the update after an overflow and lowers its scale: that is no divergence.
        scales = self.accelerator.scaler is not None or (self.is_deepspeed_enabled and self.args.fp16)
        if norm is not None and not scales and not math.isfinite(norms[0]):
            raise self._divergence("gradient norm", norms[0])
        # Each rank's loss is its part of the mean, times the number of ranks.
        counts = (int(sum(per_rank)) for per_rank in (correct, targets, tokens, slots, samples))
        step = Counts(1, sum(losses) / len(losses), *counts)
        if self.state.global_step == 0 and self.is_world_process_zero():
            check_first_loss(self.accelerator.unwrap_model(self.model), step.loss)
        self.progress.add(step)
        seen = {"non_padding": step.tokens, "all": step.slots}
        self.state.num_input_tokens_seen += seen.get(str(self.args.include_num_input_tokens_seen), 0)
        return None if norm is None else norms[0]

    def _divergence(self, quantity: str, value: float) -> RunError:
        """Return the error about a loss or gradient norm that is NaN or infinite, with the samples it may come from."""
        examples: Any = self.train_dataset
        if self.is_deepspeed_enabled and quantity == "loss":  # before the backward pass, on this rank only
            indices = self._batch_indices[len(self._losses)]
            effect = "the step changed nothing"
        else:
            indices = [
                index
                for loss, batch in zip(self._losses, self._batch_indices, strict=True)
                for index in batch
                if quantity != "loss" or not math.isfinite(loss)
            ]
            effect = "DeepSpeed has used it" if self.is_deepspeed_enabled else "the step changed nothing"
        samples = [examples.where(index) for index in indices]
        if self.args.world_size > 1 and not (self.is_deepspeed_enabled and quantity == "loss"):
            samples = gather_object(samples)
        samples = [*dict.fromkeys(samples)]  # copies, and pieces of a text, have the same place
        more = f" and {len(samples) - _MAX_NAMED_SAMPLES} more" if len(samples) > _MAX_NAMED_SAMPLES else ""
        return RunError(
            f"Optimizer step {self.state.global_step + 1}: the {quantity} is {value}, and {effect}; "
            f"its samples: {', '.join(samples[:_MAX_NAMED_SAMPLES])}{more}",
            f"Check these samples, or lower --learning_rate {self.args.learning_rate:g}",
        )

    # ---------------------------------------------------------------------------------------------- log and evaluation

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
        """Log what ``_read_step`` has read already, then evaluate and save as transformers does."""
        if self.control.should_log and self.progress.window.steps:
            tr_loss.zero_()
            self._total_loss_scalar += self.progress.window.loss
            self._globalstep_last_logged = self.state.global_step  # transformers has nothing left to log
            logs = self.progress.end_window(steps_left=self.state.max_steps - self.state.global_step)
            logs["learning_rate"] = self._get_learning_rate() if learning_rate is None else learning_rate
            if self.rate_ratio != 1:
                logs["learning_rate_b"] = logs["learning_rate"] * self.rate_ratio
            if grad_norm is not None:
                logs["grad_norm"] = float(grad_norm)
            self.log(logs, start_time)
        started = time.monotonic()
        self.epoch_ends.grad_norm = None if grad_norm is None else float(grad_norm)
        self.epoch_ends.learning_rate = learning_rate
        self.control.should_save |= self.signals.agreed is not StopRequest.NOTHING
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )
        self.signals.raise_if_requested()
        self.progress.window_started += time.monotonic() - started  # tokens/s are those of training

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as transformers does, but with the mean loss over targets, as in training, not over batches.

        The random numbers of training do not depend on evaluations.
        """
        self._evaluated = torch.zeros(len(self._source_ends), 4, device=self.args.device)
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            output = super().evaluation_loop(*args, **kwargs)
            rows = self._answer_held_out()
        assert output.metrics is not None, "the loop always reports"
        prefix = kwargs.get("metric_key_prefix", "eval")
        sources: list[list[float]] = self.accelerator.reduce(self._evaluated, reduction="sum").tolist()
        parts = {prefix: [sum(column) for column in zip(*sources, strict=True)]}
        if len(self.eval_sources) > 1:
            named = zip(self.eval_sources, sources, strict=False)
            parts |= {f"{prefix}_{name}": sums for name, sums in named if sums[-1]}
        for start, (total, weight, correct, targets) in parts.items():
            output.metrics[f"{start}_loss"] = total / weight if weight else 0.0
            output.metrics[f"{start}_token_accuracy"] = round(correct / max(targets, 1), 6)
        output.metrics.update(metrics_of(rows, self.eval_sources, prefix))
        return output

    def _answer_held_out(self) -> list[Row]:
        """Let the model answer the questions of ``--eval_generate``, and write the answers on rank 0."""
        if self.held_out is None:
            return []
        held_out, file = self.held_out
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        was_training = model.training
        model.eval()
        try:
            with self.accelerator.autocast():
                rows = held_out.evaluate(model, self.state.global_step, self.eval_sources, self.world, self.status)
        finally:
            model.train(was_training)
        if self.is_world_process_zero():
            file.add(rows)
        return rows

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        indices = inputs.pop("index", [])  # blank ones, which fill up a batch, have none
        self._source = bisect_right(self._source_ends, indices[0]) if indices else 0
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        assert loss is not None, "examples have labels"
        # The loss is this rank's sum over the targets of all ranks' batches, times the number of ranks.
        scale = self._get_num_items_in_batch([inputs], loss.device) / self.args.world_size
        self._evaluated[self._source, 0] += loss.detach() * scale
        self._evaluated[self._source, 1] += weigh_targets(inputs).to(loss.device)
        self._evaluated[self._source, 3] += count_targets(inputs).to(loss.device)
        return loss, logits, labels
