"""Models that answer the same questions one after the other: which they are, and what is measured of each."""

from __future__ import annotations

import argparse
import gc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
from evaluation.kept import KeptRows, Row
from evaluation.losses import answer_losses
from evaluation.prompt_flags import Prompts
from evaluation.questions import Question, QuestionFinder, draw_questions
from loading.adapter_check import check_adapter
from loading.checkpoint import Checkpoint, load_checkpoint, scaled_checkpoint
from loading.inference import load_for_inference

GENERAL = Path(__file__).with_name("general.jsonl")
"""Forty short questions of general knowledge, which tuning should not make a model forget."""

HELD_OUT, GENERAL_SET, BASE = "held_out", "general", "base"
_PART = 32  # questions whose rows are kept together


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


def load_subject(subject: Subject, checkpoint: Checkpoint, any_base: bool = False) -> Any:
    """Load a model without wrappers; its layers have its adapter."""
    model = load_for_inference(checkpoint, subject.adapter, any_base)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def free_models() -> None:
    """Return the memory of models to which nothing refers any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Sets:
    """The questions of a subject, with the examples that they are from.

    Args:
        max_new_tokens: length limit of an answer.
        any_base: see ``load_for_inference``.

    Attributes:
        questions: by set.

    Raises:
        ConfigError: a checkpoint or an adapter that cannot be used.
    """

    def __init__(self, subject: Subject, max_new_tokens: int, any_base: bool = False) -> None:
        self.subject, self._any_base = subject, any_base
        self.checkpoint = open_subject(subject, any_base)
        self._answerer = Answerer(self.checkpoint, max_new_tokens)
        self._examples: dict[str, ExampleSet] = {}
        self.questions: dict[str, list[Question]] = {}

    def read(self, name: str, paths: Sequence[str], data_format: str, count: int | None, seed: int) -> None:
        """Read a set.

        Args:
            count: most questions; ``None``: all.

        Raises:
            ConfigError: no questions.
            DataError: data that cannot be used.
        """
        tokenizer, positions = self.checkpoint.tokenizer, int(self.checkpoint.config.max_position_embeddings)
        prompts = self.subject.prompts
        families = prompts.families(self.checkpoint)
        options = EncodeOptions(positions, thinking=prompts.thinking, split_turns="auto")  # as a run without flags
        encoder = Encoder(tokenizer, families[0], options, families[1])
        sources = {"eval": [parse_source(path) for path in paths]}
        # All models read the same files, and the general questions are this package's.
        is_new = name == HELD_OUT and self.subject.label == BASE
        reader = DataReader(sources, encoder, DataOptions(data_format), show_progress=False, names_formats=is_new)
        examples = load_examples(reader)["eval"]
        most = len(examples) if count is None else count
        self._examples[name] = examples
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
        """Measure losses and answers that are not kept yet. The model is loaded if there are any, and let go.

        Args:
            on_rows: called with the number of rows that have been added.
        """
        label = self.subject.label
        missing = {
            name: [each for each in questions if (label, name, each.where) not in kept.rows]
            for name, questions in self.questions.items()
        }
        if not any(missing.values()):
            return
        model = load_subject(self.subject, self.checkpoint, self._any_base)
        for name, questions in missing.items():
            for start in range(0, len(questions), _PART):
                part = questions[start : start + _PART]
                kept.add(self._rows(name, part, model))
                on_rows(len(part))
        del model
        free_models()

    def _rows(self, name: str, questions: Sequence[Question], model: Any) -> list[Row]:
        rows, answerer = [], self._answerer
        for question, answer in zip(questions, answerer.answer(model, questions), strict=True):
            losses = answer_losses(model, self._examples[name][question.index])
            rows.append({
                "model": self.subject.label,
                "set": name,
                "where": question.where,
                "question": answerer.asked(question),
                "expected": answerer.shown(question, answerer.text(question.expected_ids)),
                "answer": answerer.shown(question, answer.text),
                "scores": answerer.scores(question, answer),
                "losses": [[each.targets, each.loss, each.correct] for each in losses],
            })  # fmt: skip
        return rows
