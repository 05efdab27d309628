"""Models that answer the same questions one after the other: which they are, and what is measured of each."""

from __future__ import annotations

import argparse
import gc
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel

from checkpoints.names import ADAPTER_CONFIG
from checkpoints.rope import load_yarn
from data_utils.dataset import DataOptions, DataReader
from data_utils.encode import EncodeOptions, Encoder
from data_utils.examples import ExampleSet
from data_utils.prepared import load_examples
from data_utils.sources import parse_source
from errors import ConfigError
from evaluation.answering import Answerer
from evaluation.kept import KeptRows, Key, Row
from evaluation.losses import answer_losses
from evaluation.prompt_flags import Prompts
from evaluation.questions import Question, QuestionFinder, draw_questions
from loading.adapter_check import check_adapter
from loading.checkpoint import Checkpoint, load_checkpoint, scaled_checkpoint
from loading.inference import load_for_inference
from qwen_model.answer_blocks import use_answer_blocks

logger = logging.getLogger(__name__)

GENERAL = Path(__file__).with_name("general.jsonl")
"""Forty short questions of general knowledge, which tuning should not make a model forget."""

HELD_OUT, GENERAL_SET, BASE = "held_out", "general", "base"
_PART = 64  # rows that are computed and kept together

Asked = TypeVar("Asked")


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated.

    Attributes:
        label: ``BASE``, ``adapter``, or the name of a folder.
        model: folder or id of its checkpoint.
        adapter: folder of its adapter.
        flag: that named the adapter.
        prompts: how it is asked.
    """

    label: str
    model: str
    adapter: str | None = None
    flag: str = "--adapter"
    prompts: Prompts = field(default_factory=Prompts)


def subjects_of(args: argparse.Namespace) -> list[Subject]:
    """Return the models of ``scripts.evaluate``, the base first.

    Args:
        args: flags of the command; ``--against`` are folders of checkpoints, or of adapters of the base.
    """
    base, adapter, others, prompts = args.model_name_or_path, args.adapter, args.against, Prompts.of(args)
    subjects = [Subject(BASE, base), *([Subject("adapter", base, adapter)] if adapter else [])]
    for other in others:
        name = label = Path(other).absolute().name
        taken = {subject.label for subject in subjects}
        label = next(each for each in (name, *(f"{name} {number}" for number in range(2, 99))) if each not in taken)
        if (Path(other) / ADAPTER_CONFIG).is_file():
            subjects.append(Subject(label, base, other, "--against"))
        elif not Path(other).exists() and (other.startswith((".", "/")) or other.count("/") != 1):
            raise ConfigError(f"--against {other}: there is no such folder", "Give a checkpoint or an adapter")
        else:
            subjects.append(Subject(label, other))
    return [replace(subject, prompts=prompts) for subject in subjects]


def open_subject(subject: Subject, any_base: bool = False) -> Checkpoint:
    """Return the checkpoint of a model without its weights; its adapter is checked.

    Args:
        any_base: see ``load_for_inference``.

    Raises:
        ConfigError: a checkpoint or an adapter that cannot be used.
    """
    if subject.adapter is None:
        return load_checkpoint(subject.model, chat_template=subject.prompts.chat_template)
    checkpoint = load_checkpoint(subject.model, chat_template=subject.prompts.chat_template, adapters=[subject.adapter])
    check_adapter(checkpoint, subject.adapter, subject.flag, any_base)
    return scaled_checkpoint(checkpoint, load_yarn(Path(subject.adapter)))


class Opened:
    """A model whose checkpoint is open; as a context manager its turn, behind which its weights are let go.

    Args:
        any_base: see ``load_for_inference``.

    Raises:
        ConfigError: a checkpoint or an adapter that cannot be used.
    """

    def __init__(self, subject: Subject, any_base: bool = False) -> None:
        self.subject, self._any_base = subject, any_base
        self.label, self.checkpoint = subject.label, open_subject(subject, any_base)
        self._model: Any = None

    @property
    def model(self) -> Any:
        """Return the model without wrappers, which is loaded when it is first needed; its layers have its adapter."""
        if self._model is None:
            model = load_for_inference(self.checkpoint, self.subject.adapter, self._any_base)
            self._model = model.get_base_model() if isinstance(model, PeftModel) else model
            use_answer_blocks(self._model)
        return self._model

    def __enter__(self) -> Opened:
        logger.info("%s: %s", self.label, self.subject.adapter or self.subject.model)
        return self

    def __exit__(self, *error: object) -> None:
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def add_missing(
        self,
        kept: KeptRows,
        asked: Mapping[Key, Asked],
        compute: Callable[[Any, Sequence[Asked]], Sequence[Row]],
        on_rows: Callable[[int], object],
        at_once: int | None = None,
    ) -> None:
        """Compute the rows that are not kept yet, and keep them.

        Args:
            asked: what the rows are computed from, by the values that name them.
            compute: returns the rows, without these values, of some of them; called with the model.
            on_rows: called with the number of rows that have been added.
            at_once: rows that are computed and kept together (default: 64).
        """
        items, size = list(asked.items()), at_once or _PART
        # Parts are the same whatever is kept already, so that a continued run has the same figures to the last digit.
        for part in (items[start : start + size] for start in range(0, len(items), size)):
            if all(key in kept.rows for key, _ in part):
                continue
            rows = zip(part, compute(self.model, [each for _, each in part]), strict=True)
            new = [{**dict(zip(kept.key, key, strict=True)), **row} for (key, _), row in rows if key not in kept.rows]
            kept.add(new)
            on_rows(len(new))


class Sets:
    """The questions of a model, with the examples that they are from.

    Args:
        max_new_tokens: length limit of an answer.

    Attributes:
        questions: by set.
    """

    def __init__(self, opened: Opened, max_new_tokens: int) -> None:
        self.opened, self.answerer = opened, Answerer(opened.checkpoint, max_new_tokens)
        self.examples: dict[str, ExampleSet] = {}
        self.questions: dict[str, list[Question]] = {}

    def read(self, name: str, paths: Sequence[str], data_format: str, count: int | None, seed: int) -> None:
        """Read a set.

        Args:
            count: most questions; ``None``: all.

        Raises:
            ConfigError: no questions.
            DataError: data that cannot be used.
        """
        checkpoint, prompts = self.opened.checkpoint, self.opened.subject.prompts
        tokenizer, positions = checkpoint.tokenizer, int(checkpoint.config.max_position_embeddings)
        families = prompts.families(checkpoint)
        options = EncodeOptions(positions, thinking=prompts.thinking, split_turns="auto")  # as a run without flags
        encoder = Encoder(tokenizer, families[0], options, families[1])
        sources = {"eval": [parse_source(path) for path in paths]}
        # All models read the same files, and the general questions are this package's.
        is_new = name == HELD_OUT and self.opened.label == BASE
        reader = DataReader(sources, encoder, DataOptions(data_format), show_progress=False, names_formats=is_new)
        examples = load_examples(reader)["eval"]
        most = len(examples) if count is None else count
        self.examples[name] = examples
        questions = draw_questions(examples, QuestionFinder(families, tokenizer), most, seed)
        seen: Counter[str] = Counter()
        for number, question in enumerate(questions):  # a conversation can have several
            seen[question.where] += 1
            if (place := seen[question.where]) > 1:
                questions[number] = replace(question, where=f"{question.where} ({place})")
        self.questions[name] = questions
        if not self.questions[name]:
            what = f"--data_path {' '.join(paths)} has no answer that can be expected"
            raise ConfigError(what, "Give conversations that end with an answer")

    def evaluate(self, kept: KeptRows, on_rows: Callable[[int], object]) -> None:
        """Measure losses and answers that are not kept yet.

        Args:
            on_rows: called with the number of rows that have been added.
        """
        asked: dict[Key, tuple[str, Question]] = {
            (self.opened.label, name, question.where): (name, question)
            for name, questions in self.questions.items()
            for question in questions
        }
        with self.opened:
            self.opened.add_missing(kept, asked, self._rows, on_rows)

    def _rows(self, model: Any, asked: Sequence[tuple[str, Question]]) -> list[Row]:
        answerer, questions = self.answerer, [question for _, question in asked]
        answers = answerer.answer(model, questions)
        of_each = answer_losses(model, [self.examples[name][question.index] for name, question in asked])
        return [
            {
                "question": answerer.asked(question),
                "expected": answerer.shown(question, answerer.text(question.expected_ids)),
                "answer": answerer.shown(question, answer.text),
                "scores": answerer.scores(question, answer),
                "losses": [[each.targets, each.loss, each.correct] for each in losses],
            }
            for question, answer, losses in zip(questions, answers, of_each, strict=True)
        ]
