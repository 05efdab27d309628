"""A thin Trainer: the loss of a step is weighted by the targets really used, and checkpoints are ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from qwen_model.chatml import IGNORE_INDEX
from training.loading import Checkpoint
from training.saving import save_model


class QwenTrainer(Trainer):
    """transformers' Trainer for causal language models.

    Args:
        checkpoint: the base that is tuned; tokenizer, precision and generation config of what is saved come from it.
    """

    def __init__(self, checkpoint: Checkpoint, **kwargs: Any) -> None:
        super().__init__(processing_class=checkpoint.tokenizer, **kwargs)
        self.checkpoint = checkpoint
        # Summed on the device: one read by the host per logged step, not one per step.
        self._trained_tokens = torch.zeros((), dtype=torch.long, device=self.args.device)

    @property
    def trained_tokens(self) -> int:
        """Targets learnt from so far, over all processes."""
        return int(self._trained_tokens)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        batches, count = super().get_batch_samples(*args, **kwargs)
        if count is not None:
            self._trained_tokens += count
        return batches, count

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Targets in the micro-batches of one optimizer step, over all processes.

        transformers decides by the name of the model's class whether labels are shifted; here they always are: the
        first token of a row is never a target.
        """
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        count = sum((batch["labels"][:, 1:] != IGNORE_INDEX).sum().to(device) for batch in batch_samples)
        assert isinstance(count, Tensor), "there is at least one batch"
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp(min=1)  # a step without targets has loss 0, not NaN

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            save_model(model, self.checkpoint, str(output_dir or self.args.output_dir), state_dict)
