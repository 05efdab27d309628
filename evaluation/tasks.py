"""Models on the known benchmarks: their answers as the rows of an evaluation."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chat.families import Family
from chat.samples import opens_thinking
from errors import ConfigError
from evaluation.code_execution import isolation, passes
from evaluation.evaluating import Opened
from evaluation.kept import KeptRows, Key, Row
from evaluation.task_answerer import TaskAnswerer
from evaluation.task_harness import HarnessModel, run_benchmark
from evaluation.task_prompts import BENCHMARKS, Item, Judge, is_right_number, program_of

logger = logging.getLogger(__name__)


class TaskRun:
    """A run of ``scripts.evaluate --tasks``.

    Args:
        args: flags of the command.
        items: the questions of each benchmark.
        models: that answer them.

    Attributes:
        places: the places of the questions, by benchmark.
        total: how often all models are asked.

    Raises:
        ConfigError: a chat format that cannot be used.
    """

    def __init__(self, args: argparse.Namespace, items: Mapping[str, Sequence[Item]], models: Sequence[Opened]) -> None:
        self._args, self._items, self._models = args, items, models
        self._families = [self._family(each) for each in models]
        self.places = {name: [item.where for item in of_benchmark] for name, of_benchmark in items.items()}
        asked = {
            (item.prompt, each) for of_each in items.values() for item in of_each for each in item.choices or ("",)
        }
        self.total = len(asked) * len(models)

    def identity(self) -> dict[str, Any]:
        """Return what decides the answers, beside the models."""
        values = [[name, *([item.prompt, item.expected] for item in each)] for name, each in self._items.items()]
        digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
        names = ("tasks", "num_fewshot", "limit", "seed", "max_new_tokens", "apply_chat_template")
        return {**{name: getattr(self._args, name) for name in names}, "data": digest}

    def answer(self, kept: KeptRows, advance: Callable[[int], object]) -> dict[Key, Row]:
        """Return the answers of all models to all questions, with their scores.

        Args:
            kept: what the models were asked before; grows.
            advance: called with the number of requests that have been answered.
        """
        if "humaneval" in self._items and not isolation():
            logger.warning("humaneval: this machine does not run programs without its network")
        rows: dict[Key, Row] = {}
        for opened, family in zip(self._models, self._families, strict=True):
            with opened:
                rows |= self._answers_of(opened, family, kept, advance)
        return rows

    def _family(self, opened: Opened) -> Family | None:
        """Return the chat format in which a model is asked; ``None``: prompts are continued as they are."""
        if not self._args.apply_chat_template:
            return None
        family = opened.subject.prompts.families(opened.checkpoint)[1]
        if opens_thinking(family) and any(of_benchmark[0].choices for of_benchmark in self._items.values()):
            name = opened.checkpoint.name
            what = f"--apply_chat_template: every answer of {name} begins with thinking, not with a letter"
            raise ConfigError(what, "Leave it out for benchmarks with choices")
        return family

    def _answers_of(
        self, opened: Opened, family: Family | None, kept: KeptRows, advance: Callable[[int], object]
    ) -> dict[Key, Row]:
        answerer = TaskAnswerer(opened.checkpoint, family, self._args.batch_size, self._args.max_new_tokens)
        harness = HarnessModel(opened, answerer, kept, advance)
        rows: dict[Key, Row] = {}
        for name, items in self._items.items():
            for row in _rows(opened.label, name, items, run_benchmark(harness, name, items, self._judge(name))):
                rows[row["model"], row["set"], row["where"]] = row
        if answerer.shortened:
            what = "prompts lost their beginning: they are longer than the model's positions. Lower --num_fewshot"
            logger.warning("%s: %d %s", opened.label, answerer.shortened, what)
        return rows

    def _judge(self, name: str) -> Judge:
        """Return how written answers are judged."""
        if name == "humaneval":
            return lambda item, answer: passes(program_of(item.fields, answer, self._args.apply_chat_template))
        return lambda item, answer: is_right_number(answer, item.expected)


def _rows(label: str, name: str, items: Sequence[Item], answers: Sequence[tuple[str, float]]) -> list[Row]:
    sizes = Counter(item.subject for item in items)
    benchmark = BENCHMARKS[name]
    return [
        {
            "model": label,
            "set": name,
            "where": item.where,
            "subject": item.subject,
            "question": item.asked,
            "expected": item.expected,
            "answer": answer,
            "scores": {benchmark.score: score},
            "weight": len(items) / len(sizes) / sizes[item.subject] if benchmark.by_subject else 1.0,
            "losses": [],
        }
        for item, (answer, score) in zip(items, answers, strict=True)
    ]
