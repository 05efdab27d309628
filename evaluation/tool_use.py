"""``scripts.evaluate --tool_use``: do models call the right function, with the right arguments, and only if needed?

The figures are those of the original's tool-use table. A question is a message of a user where tools are offered; what
follows it in the data is expected: a call, or an answer without one.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from chat.families import Family
from chat.reading import opening_of, read_answer, with_begun_thinking
from chat.render import encode_prompt, plain_encoder, render_prompt
from chat.turns import Tool, ToolCall, Turn
from data_utils.files import data_files, read_records
from data_utils.formats import FORMATS, recognise
from errors import ConfigError, DataError
from evaluation.answering import Writer
from evaluation.evaluating import Opened
from evaluation.kept import KeptRows, Key, Row
from evaluation.metrics import ANSWER_TOKENS, Reply, arguments_value, canonical, score_answer, sequence_f1
from evaluation.prompt_flags import Prompts
from loading.checkpoint import Checkpoint
from serving.requests import Answer

logger = logging.getLogger(__name__)

TOOL_USE = "tool_use"
"""Name of the set of these questions."""


@dataclass(frozen=True)
class ToolQuestion:
    """A question with tools.

    Attributes:
        where: place of its conversation, and its number there if that is not the first.
        turns: of the conversation up to the question.
        expected: the answer in the data.
    """

    where: str
    turns: tuple[Turn, ...]
    tools: tuple[Tool, ...]
    expected: Turn


def read_tool_questions(path: Path, data_format: str, limit: int | None, seed: int) -> list[ToolQuestion]:
    """Return the questions of conversations with tools: each message of a user that is answered.

    Args:
        limit: most questions, drawn by the seed.

    Raises:
        DataError: an invalid record, or no conversation with tools.
    """
    questions: list[ToolQuestion] = []
    for file in data_files(path):
        format_ = FORMATS.get(data_format)
        for where, record in read_records(file):
            if isinstance(record, DataError):
                raise record
            format_ = format_ or recognise(record, where)
            conversation = format_.parse(record, where)
            turns = conversation.turns if conversation.tools else ()
            asked = [at for at in range(1, len(turns)) if (turns[at - 1].role, turns[at].role) == ("user", "assistant")]
            for number, at in enumerate(asked, 1):
                place = str(where) if number == 1 else f"{where} ({number})"
                questions.append(ToolQuestion(place, turns[:at], conversation.tools, turns[at]))
    if not questions:
        fix = 'Give conversations with "tools", whose questions are answered by a call or without one'
        raise DataError(f"--tool_use {path}", "has no question for which tools are offered", fix)
    if limit is not None and limit < len(questions):
        drawn = set(Random(f"{seed}").sample(range(len(questions)), limit))
        questions = [question for index, question in enumerate(questions) if index in drawn]
    kinds = Counter(bool(question.expected.calls) for question in questions)
    for kind, what in ((True, "a call: which function is chosen"), (False, "no call: how often one is made in vain")):
        if not kinds[kind]:
            logger.warning("--tool_use %s: no question expects %s is not measured", path, what)
    return questions


# ------------------------------------------------------------------------------------------------------------- scores


def tool_scores(expected: Turn, given: Turn, tokens_of: Callable[[str], Sequence[str]]) -> dict[str, float]:
    """Return the scores of an answer that the original's table has.

    Args:
        tokens_of: the tokens of a text, of which ``tool_input`` is the ROUGE-L.
    """
    if not expected.calls:
        return {"false_positive": float(bool(given.calls))}
    names, others = ([call.name.strip().lower() for call in turn.calls] for turn in (expected, given))
    texts = [_arguments_text(turn.calls) for turn in (expected, given)]
    return {
        "tool_selection": float(names == others),
        "tool_input": sequence_f1(*map(tokens_of, texts)) if given.calls else 0.0,
    }


def _arguments_text(calls: Sequence[ToolCall]) -> str:
    """Return the arguments of calls as JSON with sorted keys; those that are no JSON count as none."""
    values = [arguments_value(call.arguments) for call in calls]
    return "\n".join("" if isinstance(value, str) else canonical(value) for value in values)


# ---------------------------------------------------------------------------------------------------------------- run


class ToolRun:
    """A run of ``scripts.evaluate --tool_use``.

    Args:
        args: flags of the command.
        models: that answer the questions.

    Attributes:
        places: the places of the questions, by set.
        total: answers of all models.

    Raises:
        ConfigError: a chat format without tools.
        DataError: a question that a chat format cannot write, or that exceeds a model's positions.
    """

    def __init__(self, args: argparse.Namespace, questions: Sequence[ToolQuestion], models: Sequence[Opened]) -> None:
        self._args, self._questions, self._models = args, questions, models
        self._callers = [Caller(each.checkpoint, each.subject.prompts, args.max_new_tokens) for each in models]
        self._prompts = [[caller.prompt(question) for question in questions] for caller in self._callers]
        self.places = {TOOL_USE: [question.where for question in questions]}
        self.total = len(questions) * len(models)

    def identity(self) -> dict[str, Any]:
        """Return what decides the answers, beside the models."""
        flags = {
            name: getattr(self._args, name) for name in ("tool_use", "data_format", "limit", "seed", "max_new_tokens")
        }
        return {**flags, "data": hashlib.sha256(repr(self._questions).encode("utf-8", "replace")).hexdigest()}

    def answer(self, kept: KeptRows, advance: Callable[[int], object]) -> dict[Key, Row]:
        """Return the answers of all models, with their scores.

        Args:
            kept: earlier answers; grows.
            advance: called with the number of new ones.
        """
        for opened, caller, prompts in zip(self._models, self._callers, self._prompts, strict=True):
            asked: dict[Key, tuple[ToolQuestion, tuple[int, ...]]] = {
                (opened.label, TOOL_USE, each[0].where): each for each in zip(self._questions, prompts, strict=True)
            }
            with opened:
                opened.add_missing(kept, asked, caller.rows, advance)
        return kept.rows


class Caller:
    """The questions of a model as prompts, and its answers as rows."""

    def __init__(self, checkpoint: Checkpoint, prompts: Prompts, max_new_tokens: int) -> None:
        self._tokenizer, self._writer = checkpoint.tokenizer, Writer(checkpoint, max_new_tokens)
        self._family: Family = prompts.families(checkpoint)[1]
        if self._family.tool_form is None:
            what = f"--tool_use: the chat format of {checkpoint.name} ({self._family.name}) has no known form of tools"
            raise ConfigError(what, "Give a checkpoint of Qwen v1, or of a family from Qwen2.5 on")
        self._stops = self._family.tool_form.stops

    def prompt(self, question: ToolQuestion) -> tuple[int, ...]:
        try:
            rendered = render_prompt(question.turns, self._family, tools=question.tools)
        except ValueError as error:
            raise DataError(question.where, f"cannot be asked: {error}", "Correct the record") from None
        ids = tuple(encode_prompt(rendered, self._tokenizer))
        if len(ids) >= self._writer.positions:
            positions = self._writer.positions
            what = f"the question has {len(ids)} tokens with its tools, and the model {positions} positions"
            raise DataError(question.where, what, "Remove the record, or some of its tools")
        return ids

    def rows(self, model: Any, questions: Sequence[tuple[ToolQuestion, tuple[int, ...]]]) -> list[Row]:
        """Let a model answer, and return the answers as rows without their names."""
        answers = self._writer.write(model, [(ids, self._stops) for _, ids in questions])
        return [self.row(question, answer) for (question, _), answer in zip(questions, answers, strict=True)]

    def row(self, question: ToolQuestion, answer: Answer) -> Row:
        """Return an answer with its scores, without what names the row."""
        opening = opening_of(self._family, True, False)
        given = read_answer(answer.text, self._family, question.tools, opening)
        text = read_answer(question.expected.content, self._family).content  # without thinking
        expected = question.expected._replace(content=text)
        scores = {
            **score_answer(Reply.of(expected), Reply.of(given)),
            **tool_scores(expected, given, self._tokens_of),
            "stopped": float(answer.finish_reason == "stop"),
            ANSWER_TOKENS: float(answer.usage.completion_tokens),
        }
        return {
            "question": question.turns[-1].content,
            "expected": Reply.of(expected).whole,
            "answer": with_begun_thinking(answer.text, self._family, opening),
            "scores": scores,
            "losses": [],
        }

    def _tokens_of(self, text: str) -> list[str]:
        """Return the tokens of a text as the original compares them: without white space."""
        ids = plain_encoder(self._tokenizer)(text)
        return " ".join(self._writer.token_bytes.of(id_).decode("utf-8", "replace") for id_ in ids).split()
