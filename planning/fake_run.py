"""One optimizer step of the trainer on tensors without data.

``QwenTrainer.train`` runs as in a real run: model preparation, optimizer and schedule, batches, forward and backward
pass, clipping, update. A read of the device would raise here, because there is no value to read; the only one of a
step, ``_read_step``, is left out.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import masking_utils

from data_utils.collate import Collator
from errors import ConfigError
from loading.checkpoint import Checkpoint
from planning.fake_cuda import looking_like_cuda
from planning.memory import FollowedMemory
from planning.model import build_model, module_names, put_in_place
from planning.optimizers import STATES, check_can_be_rehearsed, sized_optimizer
from planning.sizes import BatchShape
from processes import without_launcher
from training.config.args import RunArguments
from training.optimizer_forms import set_form
from training.rows import why_padded
from training.trainer import QwenTrainer
from training.training_arguments import build_training_arguments

# Flags that a rehearsal sets itself: no engine, no output, one step, no device.
_OWN_FLAGS: dict[str, Any] = {
    "deepspeed": None, "fsdp": False, "fsdp_config": None, "report_to": "none", "save_strategy": "no",
    "eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False, "logging_strategy": "no",
    "max_steps": 1, "num_train_epochs": 1.0, "use_cpu": True, "disable_tqdm": True, "push_to_hub": False,
    "resume_from_checkpoint": None, "torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None,
    "auto_find_batch_size": False, "dataloader_num_workers": 0, "full_determinism": False, "tf32": None,
    "skip_memory_metrics": True, "include_num_input_tokens_seen": "no", "torch_empty_cache_steps": None,
}  # fmt: skip


@dataclass
class Step:
    """A rehearsed step.

    Attributes:
        parameters: weights of the model without its adapter.
        resident: see ``Rehearsal``.
    """

    memory: FollowedMemory
    model: Any
    parameters: int
    resident: dict[str, int]
    not_rehearsed: tuple[str, ...]


class RehearsedTrainer(QwenTrainer):
    """The trainer with one batch, which reads nothing and tells the memory which part of a step begins."""

    memory: FollowedMemory
    is_alone: bool  # see rehearsal.rehearse
    batch: dict[str, Any]
    evaluation_batch: dict[str, Any]  # empty: no evaluation
    resident: dict[str, int]

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Move nothing: tensors without data cannot be exchanged, and are made in place."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        accelerator: Any = self.accelerator
        accelerator.device_placement = False  # as above
        accelerator.free_memory = lambda *objects: ()  # collects garbage of the whole process

    def get_train_dataloader(self) -> Any:
        return [self.batch]

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
        """Return an optimizer that has states but no update, where an update needs values."""
        sized = sized_optimizer(str(args.optim.value), model, self.memory)
        return sized or QwenTrainer.get_optimizer_cls_and_kwargs(args, model)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run the only step, after an update that creates the states of the optimizer.

        With accumulation, gradients of an earlier micro-batch exist during the step.
        """
        model, memory = kwargs["model"], self.memory
        memory.enter("optimizer")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        self.resident["gradients"] = memory.mark((parameter.grad for parameter in trained), "gradients")
        optimizer: Any = self.optimizer
        set_form(optimizer, training=True)
        optimizer.step()
        states = (value for state in optimizer.state.values() for value in state.values())
        self.resident["optimizer"] = memory.mark((value for value in states if isinstance(value, Tensor)), "optimizer")
        if self.args.gradient_accumulation_steps == 1:
            model.zero_grad()
        memory.begin()
        super()._run_epoch(*args, **kwargs)

    def _is_alone(self) -> bool:
        return self.is_alone

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.memory.enter("forward" if model.training else "evaluation")
        result = super().compute_loss(model, *args, **kwargs)
        if model.training:
            self.memory.enter("backward")
        return result

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self.memory.enter("clipping")
        return super()._clip_grad_norm(model)

    def _read_step(self, norm: Tensor | float | None) -> None:
        """Read nothing: the only read of a step, which has no values here. All gradients are there."""
        assert self.model is not None, "the Trainer has a model"
        gradients = (parameter.grad for parameter in self.model.parameters() if parameter.grad is not None)
        self.memory.mark(gradients, "gradients")
        self.memory.enter("optimizer")

    def _finalize_training(self, *args: Any, **kwargs: Any) -> None:
        """Evaluate; transformers would read the loss first."""
        if self.evaluation_batch:
            model: Any = self.model
            model.eval()
            with torch.no_grad():
                self.prediction_step(model, _put_batch(self.evaluation_batch), True)


def run_step(
    args: RunArguments,
    checkpoint: Checkpoint,
    batch: BatchShape,
    evaluation: BatchShape | None,
    device_type: str,
    is_alone: bool = True,
) -> Step:
    """Run one step with the flags of a run; see ``rehearsal.rehearse``."""
    optimizer = str(args.trainer_value("optim"))
    check_can_be_rehearsed(optimizer)
    with ExitStack() as stack:
        stack.enter_context(_own_state())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        training_arguments = build_training_arguments(_own_arguments(args, folder))
        model, parameters = build_model(checkpoint, args, training_arguments)
        is_padded = bool(why_padded(args, checkpoint.config.to_dict()))
        batches = [_collate(shape, is_padded) for shape in (batch, evaluation)]
        memory = FollowedMemory(device_type, module_names(model), batch.lengths)
        # transformers reads from positions whether they restart; those of padded rows, which it is given, do not.
        stack.enter_context(patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None))
        stack.enter_context(FakeTensorMode())
        put_in_place(model)
        stack.enter_context(memory)
        stack.enter_context(memory.following_calls())
        if device_type == "cuda":
            stack.enter_context(looking_like_cuda(memory))
        resident = _mark_model(memory, model, args.lora.use_lora)
        trainer = RehearsedTrainer(
            checkpoint, loss=args.model.loss, data_mixing=args.data.data_mixing, model=model, args=training_arguments
        )
        trainer.memory, trainer.resident, trainer.is_alone = memory, resident, is_alone
        trainer.batch, trainer.evaluation_batch = _put_batch(batches[0]), batches[1]
        _train(trainer, optimizer)
        return Step(memory, model, parameters, resident, tuple(_differences(args, device_type)))


def _train(trainer: RehearsedTrainer, optimizer: str) -> None:
    """Run the step.

    Raises:
        ConfigError: the update of the optimizer reads values.
    """
    try:
        trainer.train()
    except DataDependentOutputException as error:
        if trainer.memory.phase != "optimizer":
            raise
        what = f"--optim {optimizer} cannot be rehearsed: its update reads values"
        raise ConfigError(what, "Rehearse adamw_torch") from error


def _differences(args: RunArguments, device_type: str) -> Iterator[str]:
    """Yield what differs between this step and a real one."""
    if device_type == "cuda":
        yield "the CUDA context and the workspace within kernels: about 1 GiB beside the peak"
    if args.trainer_value("fp16"):
        yield "the gradient scaler of --fp16, which needs no memory"
    if args.trainer_value("torch_compile"):
        yield "--torch_compile: uncompiled blocks, which need as much memory or more"
    if (attention := args.model.attn_implementation or "").startswith("flash_attention"):
        yield f"--attn_implementation {attention}: torch's own kernel, which keeps the same tensors"
    if (optimizer := str(args.trainer_value("optim"))) in STATES:
        yield f"the update of --optim {optimizer}: the sizes of its states are computed"


def _own_arguments(args: RunArguments, folder: str) -> RunArguments:
    own = {**_OWN_FLAGS, "output_dir": folder}
    if args.trainer_value("fp16"):
        own |= {"fp16": False, "bf16": True}
    names = args.trainer_defaults.keys()
    trainer = {**args.trainer, **{name: value for name, value in own.items() if name in names}}
    return dataclasses.replace(args, trainer=trainer)


def _mark_model(memory: FollowedMemory, model: nn.Module, use_lora: bool) -> dict[str, int]:
    """Mark the storages of a model; return the bytes of its weights and of its adapter."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad and use_lora]
    frozen = [parameter for parameter in parameters if not (parameter.requires_grad and use_lora)]
    return {
        "weights": memory.mark([*frozen, *model.buffers()], "weights"),
        "adapter": memory.mark(trained, "adapter"),
    }


def _collate(shape: BatchShape | None, is_padded: bool) -> dict[str, Any]:
    """Return the batch of samples without content; empty without a shape."""
    if shape is None:
        return {}
    samples = [[0] * length for length in shape.lengths]
    examples: list[Any] = [{"input_ids": sample, "labels": sample} for sample in samples]
    return {**Collator(0, is_padded)(examples), "num_targets": shape.targets}


def _put_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        name: torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


@contextmanager
def _own_state() -> Iterator[None]:
    """Keep what a process shares as it is: accelerate's states, random states, log level, environment."""
    shared: list[Any] = [PartialState._shared_state, AcceleratorState._shared_state, GradientState._shared_state]
    before = [dict(state) for state in shared]
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        environment = patch.dict(os.environ)
        with environment, without_launcher(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for state, values in zip(shared, before, strict=True):
            state.clear()
            state.update(values)
