"""transformers' Trainer that says early whether a run fits into memory, and what to change if it does not.

Methods of the Trainer that are overridden are listed in ``tests/unit/test_library_contract.py``.
"""

from __future__ import annotations

import gc
import logging
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from commands import LOWER_BATCH, LOWER_LENGTH, USE_LORA, is_out_of_memory
from data_utils.collate import Collator
from loading.adapters import EmbeddingsPolicy
from qwen_model.summed_gradients import SummingEmbedding, summing_in_place
from training.joined_rows import Joining, token_budget
from training.longest_batch import Batch, epoch_orders, find_longest, memory_errors, unchanged_training
from training.progress import weigh_targets
from training.samplers import EpochSampler
from training.trainer_checkpoints import CheckpointTrainer

logger = logging.getLogger(__name__)


def tries_longest_batch(device: torch.device) -> bool:
    """Return whether runs on a device try their longest micro-batch: a host's memory is not the run's alone."""
    return device.type != "cpu"


class MemoryTrainer(CheckpointTrainer):
    """transformers' Trainer, which tries the longest micro-batch of the run before the first step.

    It is not tried under DeepSpeed, which updates within the backward pass.

    Attributes:
        finds_batch_size: if that micro-batch does not fit, halve it and accumulate twice as many. The samples of an
            optimizer step, their order and the number of steps stay; transformers' own search would change them.
        joins_rows: the micro-batches of a step are joined to longer rows, see ``training.joined_rows``.
    """

    finds_batch_size: bool = False
    joins_rows: bool = False
    is_lean: bool  # the loss is computed without logits

    _sampler: EpochSampler | None  # set before the model is prepared
    _tried: Batch | None = None  # while it is tried
    _budgets: dict[int, int]  # of joined rows, by the size of a micro-batch, which may be halved

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; memory that does not suffice ends the run with the place and advice."""
        with memory_errors(self._place, self._advice):
            return super().train(*args, **kwargs)

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return super()._inner_training_loop(batch_size, *args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if self._tried is None or not self._can_halve() or not is_out_of_memory(error):
                    raise
                tried, self._tried = self._tried, None
            size, steps = self.args.train_batch_size // 2, self.args.gradient_accumulation_steps * 2
            logger.info(
                "%s does not fit: continuing with --per_device_train_batch_size %d --gradient_accumulation_steps %d",
                f"{tried}".capitalize(), size, steps,
            )  # fmt: skip
            self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps = size, steps
            batch_size = self._train_batch_size = size
            self._release()

    def joining(self) -> Joining:
        """Return how the micro-batches of a step are joined, which depends on data and batch size alone."""
        size, items = self.args.train_batch_size, cast(Any, self.train_dataset)
        if self.joins_rows and size not in self._budgets:
            self._budgets[size] = token_budget(items.lengths, size)
        budget = self._budgets[size] if self.joins_rows else 0
        return Joining(budget, self.args.gradient_accumulation_steps, self.args.world_size)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Compute a micro-batch forward and backward."""
        with summing_in_place(self._is_alone()):
            return super().training_step(model, inputs, *args, **kwargs)

    def _is_alone(self) -> bool:
        """Return whether nothing stands between the loss and the gradients: no engine, no scaler of ``--fp16``."""
        return self.accelerator.distributed_type is DistributedType.NO and self.accelerator.scaler is None

    def keeps_freed_memory(self, policy: EmbeddingsPolicy | None) -> bool:
        """Return whether a run on a CPU keeps freed memory.

        Gradients of whole embeddings that autograd makes would leave gaps, half as much memory again.

        Args:
            policy: ``None``: all parameters train.
        """
        assert self.model is not None, "the Trainer has a model"
        if policy is not None and policy.mode != "full":
            return True
        return (
            self.is_lean
            and self._is_alone()
            and any(isinstance(each, SummingEmbedding) for each in self.model.modules())
        )

    def _can_halve(self) -> bool:
        return self.finds_batch_size and self.args.train_batch_size % 2 == 0

    def _release(self) -> None:
        """Release what was prepared with another batch size, and what the failed trial has allocated."""
        assert self.model is not None, "the Trainer has a model"
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        gc.collect()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, checkpoint: str | None) -> Any:
        model, dataloader = super()._prepare_for_training(max_steps, train_dataloader, checkpoint)
        if tries_longest_batch(self.args.device) and not self.is_deepspeed_enabled and self._sampler is not None:
            self._try_longest_batch(model, max_steps)
        return model, dataloader

    def _try_longest_batch(self, model: nn.Module, max_steps: int) -> None:
        """Compute the run's longest micro-batch forward and backward; what is computed is dropped."""
        assert self._sampler is not None
        collator: Any = self.data_collator
        items: Any = self.train_dataset
        accumulation = self.args.gradient_accumulation_steps
        self._tried = batch = find_longest(
            items.lengths,
            epoch_orders(self._sampler, range(int(self.state.epoch or 0), self.state.num_train_epochs)),
            self.args.train_batch_size,
            is_padded=isinstance(collator, Collator) and collator.is_padded,
            limit=(max_steps - self.state.global_step) * accumulation * self.args.world_size,
            joining=self.joining(),
        )
        if batch.indices:
            inputs = collator([items[index] for index in batch.indices])
            inputs.pop("index", None)
            weight = weigh_targets(inputs).to(self.args.device).clamp(min=1)
            with unchanged_training(model, self.optimizer, accumulates=accumulation > 1):
                MemoryTrainer.training_step(self, model, inputs, weight)
            del inputs
        self._tried = None

    def _place(self) -> str:
        if self._tried is not None:
            return f"{self._tried}".capitalize()
        return f"Optimizer step {self.state.global_step + 1}"

    def _advice(self) -> list[str]:
        """Return what lowers the memory of this run, cheapest first."""
        args, changes = self.args, []
        if not getattr(args, "activation_checkpointing", args.gradient_checkpointing):  # the newer name, if it has one
            changes.append("add --gradient_checkpointing")
        if (size := args.train_batch_size) > 1:
            changes.append(LOWER_BATCH.format(f" {size}", f" {args.gradient_accumulation_steps}"))
        changes.append(LOWER_LENGTH)
        if self.facts.get("embeddings") == "full":
            changes.append("give --trainable_embeddings chatml_tokens")
        elif self.facts.get("mode") == "full":
            changes.append(USE_LORA)
        return changes
