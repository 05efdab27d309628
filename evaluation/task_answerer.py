"""What benchmarks ask of a model: likelihoods of continuations of a text, and greedy answers.

Shapes: T tokens, C hidden size, N tokens of a continuation, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chat.families import Family
from chat.reading import opening_of, read_answer
from chat.render import encode_prompt, plain_encoder, render_prompt
from chat.turns import Turn
from evaluation.answering import Writer
from evaluation.losses import batches_of, hidden_states
from loading.checkpoint import Checkpoint


class Likelihood(NamedTuple):
    """Of a continuation.

    Attributes:
        log: sum of the logarithms of its tokens' probabilities.
        is_greedy: each of its tokens is the most likely one.
    """

    log: float
    is_greedy: bool


class TaskAnswerer:
    """Asks models that share a tokenizer.

    The models are without wrappers and in evaluation mode; their layers may have adapters.

    Args:
        checkpoint: the models' base.
        family: each prompt is the message of a user in this chat format; ``None``: prompts are continued as they are.
        rows: computed at the same time.
        max_new_tokens: length limit of an answer.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family | None, rows: int, max_new_tokens: int) -> None:
        self._family, self._rows, self._writer = family, rows, Writer(checkpoint, max_new_tokens)
        self._tokenizer = checkpoint.tokenizer
        self._encode = plain_encoder(checkpoint.tokenizer)
        self._long: set[str] = set()

    @property
    def shortened(self) -> int:
        """Return how many prompts lost their beginning, because they exceed the model's positions."""
        return len(self._long)

    # ------------------------------------------------------------------------------------------------- likelihoods

    def likelihoods(self, model: Any, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Return the likelihoods of pairs of a prompt and a continuation, in their order."""
        encoded = [self._encode_pair(*pair) for pair in pairs]
        # Letters behind one prompt need one pass.
        waiting: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for ids, continuation in encoded:
            waiting.setdefault(ids, {})[continuation] = None
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], Likelihood] = {}
        rows = list(waiting)
        for batch in batches_of(rows, self._rows):
            part = [rows[index] for index in batch]
            for ids, hidden in zip(part, hidden_states(model, part), strict=True):
                for continuation in waiting[ids]:
                    found[ids, continuation] = _likelihood(model, hidden[: len(ids)], continuation)
        return [found[each] for each in encoded]

    def _encode_pair(self, prompt: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids that the model reads, and those of the continuation; the last of these is not read."""
        if self._family is None:
            # Together: tokens may cross the border.
            before = self._encode(prompt)
            after = self._encode(prompt + continuation)[len(before) :] or self._encode(continuation)
        else:
            before, after = self._encode_prompt(prompt), self._encode(continuation)
        return self._shortened(prompt, [*before, *after[:-1]], self._writer.positions), tuple(after)

    def _encode_prompt(self, prompt: str) -> list[int]:
        if self._family is None:
            return self._encode(prompt)
        return encode_prompt(render_prompt([Turn("user", prompt)], self._family), self._tokenizer)

    def _shortened(self, prompt: str, ids: Sequence[int], most: int) -> tuple[int, ...]:
        if len(ids) > most:
            self._long.add(prompt)
        return tuple(ids[-most:])

    # ----------------------------------------------------------------------------------------------------- answers

    def write(self, model: Any, prompts: Sequence[tuple[str, tuple[str, ...]]]) -> list[str]:
        """Return greedy answers.

        Args:
            prompts: each with the texts that end its answer, and are not part of it; a chat format has its own.
        """
        rows = [(self._prompt_ids(prompt), () if self._family else stops) for prompt, stops in prompts]
        answers = self._writer.write(model, rows, places=self._rows)
        return [self._content(answer.text) for answer in answers]

    def _prompt_ids(self, prompt: str) -> tuple[int, ...]:
        positions, encoded = self._writer.positions, self._encode_prompt(prompt)
        kept = max(positions - self._writer.limit, positions // 2)  # of a prompt that leaves no room for an answer
        return self._shortened(prompt, encoded, len(encoded) if len(encoded) < positions else kept)

    def _content(self, text: str) -> str:
        """Return an answer without its thinking."""
        if self._family is None:
            return text
        return read_answer(text, self._family, (), opening_of(self._family, False, False)).content


@torch.no_grad()
def _likelihood(model: Any, hidden: Tensor, continuation: Sequence[int]) -> Likelihood:
    """Return the likelihood of the ids that follow the last positions of a row, [T, C]."""
    logits = model.get_output_embeddings()(hidden[-len(continuation) :]).float()  # [N, V]
    targets = torch.tensor(continuation, device=logits.device)
    logs = logits.log_softmax(-1).gather(-1, targets[:, None])
    return Likelihood(float(logs.sum()), bool((logits.argmax(-1) == targets).all()))
