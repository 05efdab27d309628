"""A thin Trainer: the loss of a step is weighted by the targets really used, and checkpoints are ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

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
        self._evaluated = torch.zeros(2, device=self.args.device)  # sum of cross entropies, targets

    @property
    def trained_tokens(self) -> int:
        """Targets learnt from so far, over all processes."""
        return int(self._trained_tokens)

    @trained_tokens.setter
    def trained_tokens(self, count: int) -> None:
        self._trained_tokens.fill_(count)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        batches, count = super().get_batch_samples(*args, **kwargs)
        if count is not None:
            self._trained_tokens += count
        return batches, count

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Targets in the micro-batches of one optimizer step, over all processes.

        transformers decides by the name of the model's class whether labels are shifted; here they always are: the
        first token of a row is never a target.
        """
        count = sum((batch["labels"][:, 1:] != IGNORE_INDEX).sum().to(device) for batch in batch_samples)
        assert isinstance(count, Tensor), "a step has at least one batch"
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp(min=1)  # a step without targets has loss 0, not NaN

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """transformers' loop; its loss is the mean over targets, as in training, not over batches."""
        self._evaluated.zero_()
        output = super().evaluation_loop(*args, **kwargs)
        total, count = self.accelerator.reduce(self._evaluated, reduction="sum").tolist()
        assert output.metrics is not None, "the loop always reports"
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = total / max(count, 1)
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        assert loss is not None, "examples have labels"
        count = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().to(loss.device)
        # The loss is this process's sum over the targets of all processes' batches, times the processes.
        scale = self._get_num_items_in_batch([inputs], loss.device) / self.args.world_size
        self._evaluated += torch.stack((loss.detach() * scale, count.to(loss.dtype)))
        return loss, logits, labels

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            folder = str(output_dir or self.args.output_dir)
            save_model(model, self.checkpoint, folder, state_dict, show_progress=not self.args.disable_tqdm)
