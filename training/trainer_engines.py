"""What transformers' Trainer leaves open under DDP, DeepSpeed and FSDP."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer

from loading.sharding import gather_weights, is_sharded, whole


class EngineTrainer(Trainer):
    """transformers' Trainer, with the same steps and the same files whichever engine shares the model out."""

    def create_accelerator_and_postprocess(self) -> None:
        """transformers' own; and FSDP on CPUs too, where accelerate would quietly take DDP instead."""
        if self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = False  # every parameter that trains is used by every batch
        if self.args.fsdp and self.args.bf16:
            # Gradients are summed in float32, and the loss is not rounded.
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.args.fsdp_plugin_args["mixed_precision_policy"] = policy
        config: Any = self.args.accelerator_config
        if self.args.fsdp and config.gradient_accumulation_kwargs is None:
            # Between micro-batches a process keeps its share of the gradients, not the whole ones.
            config.gradient_accumulation_kwargs = {"sync_each_batch": True}
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed steps within the backward pass: a loss that is no number is found before.

        Raises:
            RunError: it is none.
        """
        result = super().compute_loss(*args, **kwargs)
        if self.is_deepspeed_enabled:
            loss = result[0] if isinstance(result, tuple) else result
            if not math.isfinite(value := float(loss.detach())):
                raise self.diverged("loss", value)
        return result

    def diverged(self, what: str, value: float) -> Exception:
        """The error of a loss or gradient that is no number."""
        raise NotImplementedError

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return whole(super()._get_grad_norm(model, grad_norm=grad_norm))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what was trained, whatever shares it out."""
        model = self.accelerator.unwrap_model(self.model)
        weights: dict[str, Tensor] | None = None
        if is_sharded(model):
            weights = gather_weights(model, isinstance(model, PeftModel), keep=self.args.should_save)
        self._save(output_dir, weights)
