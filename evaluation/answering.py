"""Greedy answers of a model in memory to questions, several at a time, and their scores.

The rows of a batch are those of the server (``serving.batch``): each row's answer is that which it would get alone,
whatever its length, and adapters act as they are set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from chat.reading import opening_of, read_answer, with_begun_thinking
from chat.render import control_ids_of
from chat.stops import stopping_generation_config
from chat.turns import Tool
from evaluation.metrics import ANSWER_TOKENS, SCORES, Reply, score_answer
from evaluation.questions import Question
from loading.checkpoint import Checkpoint
from serving.adapters import Adapters
from serving.batch import Runner
from serving.requests import Answer, Request, Sampling
from serving.row import Row
from serving.sampling import RowSampler
from serving.scheduler import Scheduler
from serving.text_stream import TextStream, TokenBytes
from serving.ticket import Ticket

ROWS = 16
"""Answers that are written at the same time."""

# Ids do not tell which functions were offered: both answers are read as if some were, without types of parameters.
_ANY_TOOLS: tuple[Tool, ...] = ({"type": "function", "function": {"name": "", "parameters": {}}},)
_GREEDY = Sampling(0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, seed=0)


@dataclass(frozen=True)
class Written:
    """An answer as a model wrote it.

    Attributes:
        tokens: with the one that ends it.
        stopped: it ended by itself.
    """

    text: str
    tokens: int
    stopped: bool


def ignore_turn(answered: int) -> None:
    """Do nothing after a token of a batch."""


class Writer:
    """Lets models that share a tokenizer write greedy answers.

    Args:
        checkpoint: the models' base.
        max_new_tokens: length limit of an answer.

    Attributes:
        positions: of the models, for a prompt and its answer together.
        end_ids: tokens that end an answer: those at which a tuned model stops, and control tokens.
    """

    def __init__(self, checkpoint: Checkpoint, max_new_tokens: int) -> None:
        self.limit, self.positions = max_new_tokens, int(checkpoint.config.max_position_embeddings)
        self.token_bytes = TokenBytes(checkpoint.tokenizer)
        config = checkpoint.generation_config.to_dict()
        stopping = stopping_generation_config(config, checkpoint.end_ids, checkpoint.model_type)
        self.end_ids = frozenset([*stopping["eos_token_id"], *control_ids_of(checkpoint.tokenizer).values()])

    @torch.no_grad()
    def write(
        self,
        model: Any,
        prompts: Sequence[tuple[tuple[int, ...], tuple[str, ...]]],
        on_turn: Callable[[int], object] = ignore_turn,
        places: int = ROWS,
    ) -> list[Answer]:
        """Return a model's answers to prompts, in their order.

        Args:
            model: without wrappers, in evaluation mode; layers may have adapters.
            prompts: ids, and the texts that end the answer.
            on_turn: called after each token of the batch with the number of prompts that are answered.
            places: answers that are written at the same time.
        """
        rows = [self._row(*prompt) for prompt in prompts]
        scheduler = Scheduler(Runner(model, Adapters(model, {})), places)
        waiting = deque(sorted(rows, key=lambda row: -row.prompt_length))
        while waiting or scheduler.running:
            if scheduler.wants_rows and waiting:
                chosen = scheduler.choose(list(waiting))
                waiting = deque(row for row in waiting if row not in chosen)
                scheduler.begin(chosen)
            waiting.extendleft(reversed(scheduler.turn()))
            on_turn(scheduler.answered)
        return [row.ticket.answer() for row in rows]

    def _row(self, prompt_ids: tuple[int, ...], stops: tuple[str, ...]) -> Row:
        sampling = replace(_GREEDY, max_tokens=min(self.limit, self.positions - len(prompt_ids)), stop=stops)
        sampler = RowSampler(sampling, prompt_ids)
        return Row(Ticket(Request(prompt_ids, sampling)), sampler, self.token_bytes, self.end_ids, None)


class Answerer:
    """Lets models that share a tokenizer answer questions, and scores the answers.

    Args:
        checkpoint: the models' base.
        max_new_tokens: length limit of an answer.

    Attributes:
        writer: of the answers.
    """

    def __init__(self, checkpoint: Checkpoint, max_new_tokens: int) -> None:
        self._family, self.writer = checkpoint.family, Writer(checkpoint, max_new_tokens)
        form = self._family.tool_form
        self._stops = form.stops if form else ()

    # ----------------------------------------------------------------------------------------------------- answers

    def answer(
        self, model: Any, questions: Sequence[Question], on_turn: Callable[[int], object] = ignore_turn
    ) -> list[Written]:
        """Return the model's answers to questions, in their order; the model must be in evaluation mode.

        Args:
            model: without wrappers; layers may have adapters.
            on_turn: called after each token of the batch with the number of questions that are answered.
        """
        prompts = [(question.prompt_ids, self._stops_of(question)) for question in questions]
        answers = self.writer.write(model, prompts, on_turn)
        return [Written(each.text, each.usage.completion_tokens, each.finish_reason == "stop") for each in answers]

    def _stops_of(self, question: Question) -> tuple[str, ...]:
        # A text that ends calls does not end an answer that has to contain it.
        text, calls = self.text(question.expected_ids), self.expected(question).calls
        return tuple(stop for stop in self._stops if calls or stop not in text)

    # ------------------------------------------------------------------------------------------------------- scores

    def asked(self, question: Question) -> str:
        """Return the text of the message that is answered."""
        return self.text(question.asked_ids).partition("\n")[2]

    def shown(self, question: Question, text: str) -> str:
        """Return the text of an answer as it is shown."""
        return with_begun_thinking(text, self._family, question.opening)

    def expected(self, question: Question) -> Reply:
        """Return the expected answer."""
        return self._read(question, self.text(question.expected_ids, self._stops))

    def given(self, question: Question, written: Written) -> Reply:
        """Return a written answer, read as the expected one is."""
        return self._read(question, written.text)

    def scores(self, question: Question, written: Written) -> dict[str, float]:
        """Return the scores of an answer, and its number of tokens."""
        scores = score_answer(self.expected(question), self.given(question, written))
        return {**scores, "stopped": float(written.stopped), ANSWER_TOKENS: float(written.tokens)}

    def score_names(self, questions: Sequence[Question]) -> list[str]:
        """Return the names of the scores that answers to questions have."""
        blank = Written("", 0, True)
        found = {name for question in questions for name in self.scores(question, blank)}
        return [name for name in SCORES if name in found]

    def too_long(self, questions: Sequence[Question]) -> int:
        """Return how many of the expected answers exceed the limit, with the token that ends them."""
        return sum(len(question.expected_ids) >= self.writer.limit for question in questions)

    def text(self, ids: Sequence[int], stops: tuple[str, ...] = ()) -> str:
        """Return the text of ids up to a stop text, without special tokens."""
        stream = TextStream(self.writer.token_bytes, stops)
        return "".join([*map(stream.feed, ids), stream.close()])

    def _read(self, question: Question, text: str) -> Reply:
        opening = question.opening or opening_of(replace(self._family, prompt_suffix=""), True, question.after_result)
        return Reply.of(read_answer(text, self._family, _ANY_TOOLS, opening))
