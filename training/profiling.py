"""``--profile_steps``: a profile of a few optimizer steps."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.run_folder.names import PROFILE, PROFILE_OPERATORS, PROFILE_TRACE

logger = logging.getLogger(__name__)

_TABLE_ROWS = 40


class Profiler(TrainerCallback):
    """Profiles the optimizer steps ``first`` to ``last``, both included, on rank 0.

    Writes ``trace.json`` (open it in https://ui.perfetto.dev or chrome://tracing) and ``operators.txt``, a table of the
    operators that took most time: on the GPU if there is one, otherwise on the CPU.
    """

    def __init__(self, folder: str | Path, first: int, last: int) -> None:
        self.folder = Path(folder) / PROFILE
        self.first, self.last = first, last
        self._profile: profile | None = None
        self._done = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        is_due = self.first <= state.global_step + 1 <= self.last
        if is_due and self._profile is None and not self._done and state.is_world_process_zero:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise torch's profiler writes to stderr
            self._profile = profile(activities=activities)
            self._profile.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step >= self.last:
            self._save()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._save()  # the run may end before the last of these steps
        if state.is_world_process_zero and not self._done:
            logger.warning(
                "--profile_steps %d:%d: nothing was profiled, the run ended at step %d",
                self.first, self.last, state.global_step,
            )  # fmt: skip

    def _save(self) -> None:
        if self._profile is None:
            return
        finished, self._profile, self._done = self._profile, None, True
        finished.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self.folder / PROFILE_TRACE))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        table = finished.key_averages().table(
            sort_by=f"self_{device}_time_total", row_limit=_TABLE_ROWS, max_name_column_width=60
        )
        (self.folder / PROFILE_OPERATORS).write_text(table + "\n", encoding="utf-8")
        logger.info("Profile of steps %d to %d: %s", self.first, self.last, self.folder)
