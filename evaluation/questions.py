"""Questions of held-out examples: the ids of a prompt and of the answer that is expected, read from tokenised ones.

Only control tokens separate messages, and no text of the data contains any, so the ids say where an answer begins. What
a template of the user's writes is divided by what is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from chat.chatml import IM_END, IM_START
from chat.families import Family
from chat.label_mask import IGNORE_INDEX
from chat.render import control_ids_of, plain_encoder
from data_utils.encode import Example
from data_utils.examples import ExampleSet


@dataclass(frozen=True)
class Question:
    """A prompt with the answer that is expected.

    Attributes:
        where: place of its conversation, ``file:line``.
        source: index of its source.
        prompt_ids: from the start of the conversation to where the answer begins.
        expected_ids: of the answer, without the token that ends it.
        asked_ids: of the message before the answer, with its role and without control tokens; with a template of the
            user's the prompt.
        opening: what opens the answer in the prompt, such as thinking.
        after_result: the answer goes on after the result of a call in the same message.
        index: of its example in the set.
    """

    where: str
    source: int
    prompt_ids: tuple[int, ...]
    expected_ids: tuple[int, ...]
    asked_ids: tuple[int, ...]
    opening: str = ""
    after_result: bool = False
    index: int = 0


class QuestionFinder:
    """Finds the last answer of an example that is trained and complete.

    Args:
        families: behind the prompts of the examples: with thinking and without it, if they differ.
        tokenizer: that encoded them.
    """

    def __init__(self, families: Iterable[Family], tokenizer: Any) -> None:
        families = list(families)
        own = families[0].own_template
        encode, control = plain_encoder(tokenizer), control_ids_of(tokenizer, families[0].placed_tokens)
        self._stop = None if own is None else control[own.stop]
        self._start, self._end = control.get(IM_START, -1), control.get(IM_END, -1)
        openings = sorted({(family.header("assistant"), family.prompt_suffix) for family in families}, key=_length)
        self._headers = [(encode(f"{header}{opening}"), opening) for header, opening in openings]

    def find(self, example: Example, where: str = "", source: int = 0, index: int = 0) -> Question | None:
        """Return the question of an example; ``None`` for a plain text, and if no trained answer is complete."""
        ids, labels = example["input_ids"], example["labels"]
        if self._stop is not None:
            return self._find_before_stop(ids, labels, Question(where, source, (), (), (), index=index))
        starts = [index for index, id_ in enumerate(ids) if id_ == self._start]
        for number in reversed(range(len(starts))):
            start = starts[number]
            end = _index(ids, self._end, start)
            if end is None or end > (starts[number + 1] if starts[number + 1 :] else len(ids)):
                continue
            if (found := self._answer(ids, labels, start + 1, end)) is None:
                continue
            first, last, opening, after_result = found
            asked = ids[starts[number - 1] + 1 : start] if number else []
            asked = asked[: _index(asked, self._end, 0)]
            answer = tuple(ids[:first]), tuple(ids[first:last]), tuple(asked), opening, after_result
            return Question(where, source, *answer, index)
        return None

    def _find_before_stop(self, ids: list[int], labels: list[int], question: Question) -> Question | None:
        """Return the question of an example that a template of the user's has written: only its last token is known."""
        ends = [index for index, id_ in enumerate(ids) if id_ == self._stop and labels[index] != IGNORE_INDEX]
        if not ends:
            return None
        first = _trained_from(labels, 0, ends[-1])
        if not first:  # a mask that trains everything does not say where the answer begins
            return None
        prompt, expected = tuple(ids[:first]), tuple(ids[first : ends[-1]])
        return replace(question, prompt_ids=prompt, expected_ids=expected, asked_ids=prompt)

    def _answer(self, ids: list[int], labels: list[int], start: int, end: int) -> tuple[int, int, str, bool] | None:
        """Return where the last trained answer of a message begins and ends, what opens it, and whether a result does.

        Args:
            start, end: of the message, without control tokens.
        """
        headers = [(start + len(each), opening) for each, opening in self._headers if ids[start:][: len(each)] == each]
        headers = [(begin, opening) for begin, opening in headers if begin <= end]
        if not headers:
            return None
        trained = [index for index in range(headers[0][0], end) if labels[index] != IGNORE_INDEX]
        last = trained[-1] + 1 if trained else end
        if not trained and (labels[end] == IGNORE_INDEX or end not in [begin for begin, _ in headers]):
            return None
        # One message can have several answers, with the results of calls between them.
        first = _trained_from(labels, start, last)
        # A mask that trains headers, too, does not say where the answer begins.
        begin, opening = headers[-1] if first <= start else [each for each in headers if each[0] <= first][-1]
        return max(begin, first), last, opening, first > begin


def _trained_from(labels: list[int], start: int, end: int) -> int:
    """Return where the trained labels before ``end`` begin, not before ``start``."""
    return next((at + 1 for at in range(end - 1, start - 1, -1) if labels[at] == IGNORE_INDEX), start)


def _length(texts: tuple[str, str]) -> int:
    return sum(map(len, texts))


def _index(ids: list[int], id_: int, begin: int) -> int | None:
    try:
        return ids.index(id_, begin)
    except ValueError:
        return None


def draw_questions(examples: ExampleSet, finder: QuestionFinder, count: int, seed: int) -> list[Question]:
    """Return questions of a set, drawn as equally from its sources as these allow, in the order of the set.

    Args:
        count: of the questions; all there are if the set has fewer.
        seed: the same draws the same.
    """
    queues = []
    start = 0
    for source, size in enumerate(examples.source_sizes):
        indices = list(range(start, start + size))
        Random(f"{seed} {source}").shuffle(indices)
        queues.append((source, indices))
        start += size
    drawn: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, Question]] = {}
    while queues and len(drawn) < count:
        waiting, queues = queues, []
        for source, indices in waiting:
            while indices and len(drawn) < count:
                index = indices.pop()
                question = finder.find(examples[index], examples.where(index), source, index)
                if question is not None and (key := (question.prompt_ids, question.expected_ids)) not in drawn:
                    drawn[key] = index, question
                    queues.append((source, indices))
                    break
    return [question for _, question in sorted(drawn.values(), key=lambda item: item[0])]
