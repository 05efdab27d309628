"""A loaded model as benchmarks ask it: likelihoods of continuations of a text, and greedy answers.

Shapes: B rows, T tokens, C hidden size, N tokens of a continuation, V vocabulary rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chat.families import Family
from chat.reading import opening_of, read_answer
from chat.render import encode_prompt, plain_encoder, render_prompt
from chat.turns import Turn
from evaluation.answering import GREEDY, ends_of, write_answers
from loading.checkpoint import Checkpoint
from serving.requests import Request
from serving.row import Row
from serving.sampling import RowSampler
from serving.text_stream import TokenBytes
from serving.ticket import Ticket

logger = logging.getLogger(__name__)


class Likelihood(NamedTuple):
    """Of a continuation.

    Attributes:
        log: sum of the logarithms of its tokens' probabilities.
        is_greedy: each of its tokens is the most likely one.
    """

    log: float
    is_greedy: bool


class TaskModel:
    """A model with its tokenizer.

    Args:
        load: returns the model without wrappers, in evaluation mode; called when the model is first asked.
        family: each prompt is the message of a user in this chat format; ``None``: prompts are continued as they are.
        rows: computed at the same time.
        max_new_tokens: length limit of an answer.
    """

    def __init__(
        self, checkpoint: Checkpoint, load: Callable[[], Any], family: Family | None, rows: int, max_new_tokens: int
    ) -> None:
        self._load, self._family, self._rows, self._limit = load, family, rows, max_new_tokens
        self._tokenizer = checkpoint.tokenizer
        self._encode = plain_encoder(checkpoint.tokenizer)
        self._positions = int(checkpoint.config.max_position_embeddings)
        self._end_ids = ends_of(checkpoint)
        self._token_bytes = TokenBytes(checkpoint.tokenizer)
        self._long: set[str] = set()

    @property
    def shortened(self) -> int:
        """Return how many prompts lost their beginning, because they exceed the model's positions."""
        return len(self._long)

    @cached_property
    def _model(self) -> Any:
        return self._load()

    # ------------------------------------------------------------------------------------------------- likelihoods

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Return the likelihoods of continuations, which are pairs of a prompt and a continuation, in their order."""
        encoded = [self._encode_pair(*pair) for pair in pairs]
        # Letters behind one prompt need one pass.
        waiting: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for ids, continuation in encoded:
            waiting.setdefault(ids, {})[continuation] = None
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], Likelihood] = {}
        ordered = sorted(waiting, key=len, reverse=True)
        for start in range(0, len(ordered), self._rows):
            part = ordered[start : start + self._rows]
            for ids, hidden in zip(part, self._hidden(part), strict=True):
                for continuation in waiting[ids]:
                    found[ids, continuation] = self._likelihood(hidden[: len(ids)], continuation)
        return [found[each] for each in encoded]

    def _encode_pair(self, prompt: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids that the model reads, and those of the continuation; the last of these is not read."""
        if self._family is None:
            # Together: tokens may cross the border.
            before = self._encode(prompt)
            after = self._encode(prompt + continuation)[len(before) :] or self._encode(continuation)
        else:
            before, after = self._encode_prompt(prompt), self._encode(continuation)
        return self._shortened(prompt, [*before, *after[:-1]], self._positions), tuple(after)

    def _encode_prompt(self, prompt: str) -> list[int]:
        if self._family is None:
            return self._encode(prompt)
        return encode_prompt(render_prompt([Turn("user", prompt)], self._family), self._tokenizer)

    def _shortened(self, prompt: str, ids: Sequence[int], most: int) -> tuple[int, ...]:
        if len(ids) > most:
            self._long.add(prompt)
        return tuple(ids[-most:])

    @torch.no_grad()
    def _hidden(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the last hidden states of rows of ids, [B, T, C]; padding is on the right."""
        device = self._model.get_input_embeddings().weight.device
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *([0] * (longest - len(row)))] for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(longest, device=device) < lengths[:, None]
        padded = {} if bool(mask.all()) else {"attention_mask": mask.long()}
        hidden: Tensor = self._model.base_model(input_ids=ids, use_cache=False, **padded)[0]
        return hidden

    @torch.no_grad()
    def _likelihood(self, hidden: Tensor, continuation: Sequence[int]) -> Likelihood:
        """Return the likelihood of the ids that follow the last positions of a row, [T, C]."""
        logits = self._model.get_output_embeddings()(hidden[-len(continuation) :]).float()  # [N, V]
        targets = torch.tensor(continuation, device=logits.device)
        logs = logits.log_softmax(-1).gather(-1, targets[:, None])
        return Likelihood(float(logs.sum()), bool((logits.argmax(-1) == targets).all()))

    # ----------------------------------------------------------------------------------------------------- answers

    def write(self, prompts: Sequence[tuple[str, tuple[str, ...]]], on_turn: Callable[[int], object]) -> list[str]:
        """Return greedy answers.

        Args:
            prompts: each with the texts that end its answer, and are not part of it.
            on_turn: called after each token of the batch with the number of prompts that are answered.
        """
        rows = [self._row(*each) for each in prompts]
        answers = write_answers(self._model, rows, self._rows, on_turn)
        return [self._content(answer.text) for answer in answers]

    def _row(self, prompt: str, stops: tuple[str, ...]) -> Row:
        kept = max(self._positions - self._limit, self._positions // 2)  # of a prompt that leaves too little room
        encoded = self._encode_prompt(prompt)
        ids = self._shortened(prompt, encoded, len(encoded) if len(encoded) < self._positions else kept)
        room = min(self._limit, self._positions - len(ids))
        sampling = replace(GREEDY, max_tokens=room, stop=() if self._family else stops)
        return Row(Ticket(Request(ids, sampling)), RowSampler(sampling, ids), self._token_bytes, self._end_ids, None)

    def _content(self, text: str) -> str:
        """Return an answer without its thinking."""
        if self._family is None:
            return text
        return read_answer(text, self._family, (), opening_of(self._family, False, False)).content
