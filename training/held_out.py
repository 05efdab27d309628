"""Answers to held-out questions at each evaluation (``--eval_generate``): their scores, and ``eval_samples.jsonl``."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from peft import PeftModel
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from checkpoints.files import save_text
from checkpoints.names import EVAL_SAMPLES
from data_utils.examples import ExampleSet
from errors import ConfigError
from evaluation.answering import Answerer, Written
from evaluation.metrics import SCORES, mean_scores
from evaluation.questions import Question, QuestionFinder, draw_questions
from loading.checkpoint import Checkpoint
from loading.prompt_modes import prompt_families
from training.config.args import RunArguments
from training.distributed.heartbeat import RankStatus
from training.distributed.world import World
from training.run_folder.curves import Row

logger = logging.getLogger(__name__)

_LONGEST_NAME = 40


class HeldOut:
    """The questions of a run, and how they are answered.

    Args:
        questions: those of all ranks.

    Attributes:
        scores: names of the scores that their answers have.
    """

    def __init__(self, questions: Sequence[Question], checkpoint: Checkpoint, max_new_tokens: int) -> None:
        self.questions, self.answerer = questions, Answerer(checkpoint, max_new_tokens)
        self.scores = self.answerer.score_names(questions)

    def evaluate(self, model: Any, step: int, names: Sequence[str], world: World, status: RankStatus) -> list[Row]:
        """Let the model answer, each rank a part of the questions, and return a row for each of all questions.

        Args:
            model: in evaluation mode, without the wrappers of engines.
            names: of the sources.
        """
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        own = self.questions[world.rank :: world.size]
        with tqdm(
            total=len(own), desc="answers", leave=False, disable=None if world.is_first else True, file=sys.stderr
        ) as bar:

            def on_turn(answered: int) -> None:
                status.record_activity("while answering")
                bar.update(answered - bar.n)

            written = self.answerer.answer(base, own, on_turn)
        parts = world.gather("answers", [[each.text, each.tokens, each.stopped] for each in written])
        rows: list[Row] = []
        for number, question in enumerate(self.questions):
            answer = Written(*parts[number % world.size][number // world.size])
            rows.append({
                "step": step,
                "source": names[question.source],
                "where": question.where,
                "question": self.answerer.asked(question),
                "expected": self.answerer.shown(question, self.answerer.text(question.expected_ids)),
                "answer": self.answerer.shown(question, answer.text),
                "scores": self.answerer.scores(question, answer),
            })  # fmt: skip
        return rows


def choose_held_out(args: RunArguments, checkpoint: Checkpoint, sets: Mapping[str, ExampleSet]) -> HeldOut | None:
    """Draw the questions of ``--eval_generate``; ``None`` without it.

    Raises:
        ConfigError: the evaluation data has no answers, or none with the score of ``--metric_for_best_model``.
    """
    number, limit = args.options.eval_generate, args.options.eval_max_new_tokens
    if number is None:
        return None
    families = prompt_families(checkpoint, args.data.thinking, args.data.template_arguments)
    finder = QuestionFinder(families, checkpoint.tokenizer)
    questions = draw_questions(sets["eval"], finder, number, args.trainer_value("seed"))
    if not questions:
        reason = "is plain text" if sets["eval"].has_text else "has no answer that is trained and complete"
        raise ConfigError(f"--eval_generate {number}: the evaluation data {reason}", "Give conversations, or remove it")
    if len(questions) < number:
        logger.warning("--eval_generate %d: the evaluation data has %d questions; all are used", number, len(questions))
    held_out = HeldOut(questions, checkpoint, limit)
    if too_long := held_out.answerer.too_long(questions):
        logger.warning(
            "--eval_max_new_tokens %d: %d of %d expected answers are longer and cannot be reached",
            limit, too_long, len(questions),
        )  # fmt: skip
    metric = (args.trainer_value("metric_for_best_model") or "loss").removeprefix("eval_")
    if metric in SCORES and metric not in held_out.scores:
        what = f"--metric_for_best_model {metric}: none of the {len(questions)} expected answers has it"
        raise ConfigError(what, f"Give one of {', '.join(held_out.scores)}")
    return held_out


def source_names(examples: ExampleSet | None) -> list[str]:
    """Return a short name for each source of a set, for metrics: of its file, with a number if it is not the first."""
    names: list[str] = []
    for source in [] if examples is None else examples.report.sources:
        stem = Path(source.name.partition("#")[0].partition("@x")[0]).name.partition(".")[0]
        base = re.sub(r"[^\w-]+", "_", stem)[:_LONGEST_NAME] or "source"
        numbered = (f"{base}_{number}" for number in count(2))
        names.append(next(name for name in chain([base], numbered) if name not in names))
    return names


def metrics_of(rows: Sequence[Row], names: Sequence[str], prefix: str) -> dict[str, float]:
    """Return the means of rows by name, and those of each source if there are several."""
    parts = {prefix: list(rows)}
    if len(names) > 1:
        parts |= {f"{prefix}_{name}": [row for row in rows if row["source"] == name] for name in names}
    means = {start: mean_scores(row["scores"] for row in part) for start, part in parts.items()}
    return {f"{start}_{name}": round(value, 6) for start, mean in means.items() for name, value in mean.items()}


class SampleFile(TrainerCallback):
    """``eval_samples.jsonl``: the rows of all evaluations of a run, written whole after each, each step once."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVAL_SAMPLES

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self._path.exists():
            self._write([row for row in self._rows() if row["step"] <= state.global_step])

    def add(self, rows: Sequence[Row]) -> None:
        """Add the rows of an evaluation; those of its step and of later ones are replaced: they are trained again."""
        step = min(row["step"] for row in rows)
        self._write([*(row for row in self._rows() if row["step"] < step), *rows])

    def _rows(self) -> list[Row]:
        rows: list[Row] = []
        lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n") if self._path.exists() else []
        for line in lines[:-1]:
            try:
                row = json.loads(line)
                rows += [row] if isinstance(row["step"], int) else []
            except (ValueError, LookupError, TypeError, RecursionError):
                logger.warning("%s: a line that this command did not write is left out", self._path)
        return rows

    def _write(self, rows: Sequence[Row]) -> None:
        save_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), self._path)
