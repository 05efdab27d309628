"""``--profile_steps``: what a few optimizer steps spend their time on."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

PROFILE_FOLDER = "profile"
TRACE = "trace.json"
OPERATORS = "operators.txt"
_TABLE_ROWS = 40


class Profiler(TrainerCallback):
    """Records the optimizer steps ``first`` to ``last``, both included, in the first process.

    Writes ``trace.json`` (open it in https://ui.perfetto.dev or chrome://tracing) and ``operators.txt``, a table of the
    operators that took most time: on the GPU where there is one, else on the CPU.
    """

    def __init__(self, folder: str | Path, first: int, last: int) -> None:
        self.folder = Path(folder) / PROFILE_FOLDER
        self.first, self.last = first, last
        self._profile: profile | None = None
        self._done = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        due = self.first <= state.global_step + 1 <= self.last
        if due and self._profile is None and not self._done and state.is_world_process_zero:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's recorder writes its own lines to stderr
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
        self._save()  # a run may end before the last of the steps
        if state.is_world_process_zero and not self._done:
            logger.warning(
                "--profile_steps %d:%d: nothing was profiled, the run went to step %d",
                self.first, self.last, state.global_step,
            )  # fmt: skip

    def _save(self) -> None:
        if self._profile is None:
            return
        recorded, self._profile, self._done = self._profile, None, True
        recorded.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self.folder / TRACE))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        table = recorded.key_averages().table(
            sort_by=f"self_{device}_time_total", row_limit=_TABLE_ROWS, max_name_column_width=60
        )
        (self.folder / OPERATORS).write_text(table + "\n", encoding="utf-8")
        logger.info("Profile of steps %d to %d: %s", self.first, self.last, self.folder)
