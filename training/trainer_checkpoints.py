"""transformers' Trainer with complete checkpoints: how they are saved, and how a run resumes from one.

Methods of the Trainer that are overridden are listed in ``tests/unit/test_library_contract.py``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from loading.checkpoint import Checkpoint
from loading.sharding import gather_weights, is_sharded
from training.distributed.world import World
from training.optimizer_forms import has_forms, set_form
from training.run_folder.failures import saving_errors
from training.run_folder.manifest import saved_arguments, write_manifest
from training.run_folder.names import TRAINER_STATE
from training.run_folder.resumed import find_files, linked_checkpoint, reading
from training.run_folder.saving import restore_tensors, save_model
from training.run_folder.staging import staged_checkpoint
from training.run_folder.states import check_states, known_classes
from training.samplers import EpochSampler
from training.trainer_resume import (
    EpochEnds,
    add_missing_states,
    check_moments,
    check_types,
    import_projectors,
    move_projectors,
    set_learning_rate,
    settings_of,
    superseded_by,
)

logger = logging.getLogger(__name__)


class CheckpointTrainer(Trainer):
    """transformers' Trainer, whose checkpoints are complete, and whose resumed run ends like an uninterrupted one.

    Checkpoints contain the training form of an optimizer that has one, the result its evaluation form.

    Attributes:
        checkpoint: the base model's; what is saved takes its tokenizer, precision and generation config.
        facts: what checkpoints record of the run, see ``training.run_folder.changes``.
        world: the ranks of the run.
    """

    checkpoint: Checkpoint
    facts: Mapping[str, Any]
    world: World

    _sampler: EpochSampler | None = None
    _staging: Path | None = None  # while a checkpoint is saved
    _resumed: tuple[Path, Path] | None = None  # the checkpoint and the folder with links to its files
    _unread: str | None = None  # the latter, until the first epoch after a resume begins
    _resumed_at_epoch_end: bool = False  # the checkpoint is of the last step of an epoch

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epoch_ends = EpochEnds()
        self.add_callback(self.epoch_ends)

    # -------------------------------------------------------------------------------------------------------- resuming

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the start or from a checkpoint, of which only what its manifest names is read."""
        if resume_from_checkpoint is None:
            return super().train(None, *args, **kwargs)
        checkpoint = Path(resume_from_checkpoint)
        import_projectors(self.args)
        with linked_checkpoint(checkpoint) as links:
            self._resumed = checkpoint, links
            with self._reading("its state"):
                check_states(links, find_files(checkpoint), saved_arguments(checkpoint).get("save_only_model", False))
            return super().train(str(links), *args, **kwargs)

    def _reading(self, what: str) -> AbstractContextManager[None]:
        assert self._resumed is not None, "only a resumed run reads a checkpoint"
        return reading(*self._resumed, what)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Restore the state; intervals of logging, saving and evaluating are the command's, not the checkpoint's."""
        if checkpoint is None:
            position = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        else:
            with self._reading("the trainer's state"):
                position = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
                add_missing_states(self.state, self.callback_handler.callbacks)
            self._unread = checkpoint
            self._resumed_at_epoch_end = self.state.global_step % steps_per_epoch == 0
        self.state.compute_steps(self.args, max_steps)
        return position

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, checkpoint: str | None) -> Any:
        if checkpoint is None or not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, checkpoint)
        with self._reading("the state of DeepSpeed"):
            return super()._prepare_for_training(max_steps, train_dataloader, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._reading("the weights"):
            self._load_weights(resume_from_checkpoint, model)

    def _load_weights(self, folder: str, model: Any = None) -> None:
        """Restore exactly the tensors that were saved; transformers would only log missing and unknown ones."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(folder, model)
        else:
            restore_tensors(self.accelerator.unwrap_model(self.model), Path(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        set_form(self.optimizer, training=True)
        before = settings_of(self.optimizer, self.lr_scheduler)
        with self._reading("optimizer and schedule"):
            self._load_states(checkpoint)
            check_types(settings_of(self.optimizer, self.lr_scheduler), before)
            check_moments(self.optimizer, self.args)
            set_learning_rate(self.lr_scheduler, before["schedule"].get("base_lrs", []))

    def _load_states(self, checkpoint: str) -> None:
        with torch.serialization.safe_globals(known_classes()):
            super()._load_optimizer_and_scheduler(checkpoint)
        move_projectors(self.optimizer)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with self._reading("the loss scale"):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with self._reading("the random state"):
                super()._load_rng_state(checkpoint)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch unless training is over: after a resume from the last step, transformers would do one more."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        self._end_interrupted_epoch()
        if self._sampler is not None:  # a dataloader that skips batches after a resume does not pass the epoch on
            self._sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._end_interrupted_epoch()
        return super()._finalize_training(*args, **kwargs)

    def _end_interrupted_epoch(self) -> None:
        """Do what is due at the end of an epoch, if the run died between its last step and its end."""
        checkpoint, self._unread = self._unread, None
        if checkpoint is None or not (self._resumed_at_epoch_end or self.control.should_training_stop):
            return
        if not self.epoch_ends.is_missing(self.state.global_step):
            return
        self._load_rng_state(checkpoint)
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        norm, rate = self.epoch_ends.grad_norm, self.epoch_ends.learning_rate
        self._maybe_log_save_evaluate(self._tr_loss, norm, self.model_wrapped, None, 0, None, time.time(), rate)

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint; for an optimizer with forms its state too, to convert them."""
        best = Path(str(self.state.best_model_checkpoint))
        metric = f"{self.args.metric_for_best_model} {self.state.best_metric:.4g}"
        logger.info("The result is the best checkpoint, of step %s (%s)", self.state.best_global_step, metric)
        has_training_form = has_forms(self.optimizer) and not self.args.save_only_model
        set_form(self.optimizer, training=has_training_form)
        with linked_checkpoint(best) as links, reading(best, links, "the best model"):
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                self.state.best_model_checkpoint = str(links)
                try:
                    super()._load_best_model()
                finally:
                    self.state.best_model_checkpoint = str(best)
            else:
                self._load_weights(str(links))
            if has_training_form:
                self._load_states(str(links))

    # ---------------------------------------------------------------------------------------------------------- saving

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save transformers' ``checkpoint-N`` in one step: staged in a hidden folder, renamed when it is complete."""
        output, writes = Path(str(self.args.output_dir)), self.args.should_save
        final = output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        set_form(self.optimizer, training=not self.args.save_only_model)

        def superseded() -> list[Path]:  # transformers' own rotation sees the hidden folder only
            return superseded_by(final, self.args.save_total_limit, self.state.best_model_checkpoint)

        with saving_errors(output), staged_checkpoint(final, writes, superseded) as staged:
            self.world.barrier("checkpoint")  # no collective: a large checkpoint may take longer than its time-out
            self._staging = staged.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(final)
                if writes:
                    self.state.save_to_json(str(staged / TRAINER_STATE))
            self.world.barrier("checkpoint")
            if writes:
                write_manifest(staged, self.state.global_step, self.facts)
            self.world.barrier("checkpoint")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what was trained, gathered from all ranks if the engine shards it."""
        if self._staging is None:
            set_form(self.optimizer, training=False)
        model = self.accelerator.unwrap_model(self.model)
        weights: dict[str, Tensor] | None = None
        if is_sharded(model):
            weights = gather_weights(model, isinstance(model, PeftModel), keep=self.args.should_save)
        self._save(output_dir, weights)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            folder = str(output_dir or self.args.output_dir)
            exact = self._staging is not None  # a checkpoint to resume from keeps the precision of memory
            save_model(model, self.checkpoint, folder, state_dict, not self.args.disable_tqdm, exact)
