"""Questions of held-out examples: the ids of a prompt and of the answer that is expected, read from tokenised ones.

Only control tokens separate messages, and no text of the data contains any, so the ids say where an answer begins.
"""

from __future__ import annotations

from dataclasses import dataclass
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
        asked_ids: of the message before the answer, with its role and without control tokens.
        after_result: the answer goes on after the result of a call in the same message.
        index: of its example in the set.
    """

    where: str
    source: int
    prompt_ids: tuple[int, ...]
    expected_ids: tuple[int, ...]
    asked_ids: tuple[int, ...]
    after_result: bool = False
    index: int = 0


class QuestionFinder:
    """Finds the last answer of an example that is trained and complete.

    Args:
        family: of the examples.
        tokenizer: that encoded them.
    """

    def __init__(self, family: Family, tokenizer: Any) -> None:
        control = control_ids_of(tokenizer)
        self._start, self._end = control[IM_START], control[IM_END]
        self._header = plain_encoder(tokenizer)(f"assistant\n{family.prompt_suffix}")

    def find(self, example: Example, where: str = "", source: int = 0, index: int = 0) -> Question | None:
        """Return the question of an example; ``None`` for a plain text, and if no trained answer is complete."""
        ids, labels = example["input_ids"], example["labels"]
        starts = [index for index, id_ in enumerate(ids) if id_ == self._start]
        for number in reversed(range(len(starts))):
            start = starts[number]
            begin = start + 1 + len(self._header)
            end = _index(ids, self._end, begin)
            is_answer = end is not None and ids[start + 1 : begin] == self._header
            if not is_answer or end is None or end > (starts[number + 1] if starts[number + 1 :] else len(ids)):
                continue
            trained = [index for index in range(begin, end) if labels[index] != IGNORE_INDEX]
            if not trained and (end > begin or labels[end] == IGNORE_INDEX):
                continue
            # One message can have several answers, with the results of calls between them.
            last = trained[-1] + 1 if trained else end
            first = next((at + 1 for at in range(last - 1, begin - 1, -1) if labels[at] == IGNORE_INDEX), begin)
            asked = ids[starts[number - 1] + 1 : start] if number else []
            asked = asked[: _index(asked, self._end, 0)]
            answer = tuple(ids[:first]), tuple(ids[first:last]), tuple(asked), first > begin
            return Question(where, source, *answer, index)
        return None


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
