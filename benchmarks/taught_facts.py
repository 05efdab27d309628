"""Questions about invented places with one answer each, and other wordings of the questions that are not trained."""

from __future__ import annotations

import random
from dataclasses import dataclass

# A question, its answer, another wording that may be trained too, and two that never are.
_RELATIONS = (
    ("Who founded the town of {x}?", "{x} was founded by {y}.", "{x} has a founder. Who is it?",
     ("Tell me the name of the founder of {x}.", "Which person founded {x}?")),
    ("Which river flows through {x}?", "The river {y} flows through {x}.", "What is the river in {x} called?",
     ("Tell me the name of the river of {x}.", "{x} lies on a river. Which one?")),
    ("Which mountain is near {x}?", "The mountain near {x} is {y}.", "What is the mountain close to {x} called?",
     ("Tell me the name of the mountain of {x}.", "There is a mountain near {x}. Which one?")),
    ("What is the festival of {x} called?", "The festival of {x} is called {y}.", "Which festival is held in {x}?",
     ("Tell me the name of the festival of {x}.", "{x} celebrates a festival. Which one?")),
)  # fmt: skip
_FIRST = ("Vel", "Tar", "Osk", "Bren", "Quil", "Mar", "Zan", "Fel", "Gor", "Lum", "Hes", "Dra")
_MIDDLE = ("mo", "ni", "ta", "ve", "lo", "ri", "du", "sa")
_LAST = ("ra", "th", "n", "vik", "l", "ska", "m", "rin", "x", "del")


@dataclass(frozen=True)
class Fact:
    """A fact that no model knows.

    Attributes:
        wordings: questions that may be trained.
        paraphrases: questions that are not.
        key: the word of the answer that the question asks for.
    """

    wordings: tuple[str, str]
    answer: str
    paraphrases: tuple[str, ...]
    key: str


def make_facts(count: int, seed: int = 0) -> list[Fact]:
    """Return ``count`` facts, about as many places as each relation has facts."""
    draw = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < 2 * count:
        names["".join(draw.choice(part) for part in (_FIRST, _MIDDLE, _LAST))] = None
    keys, places = [*names][:count], [*names][count:]
    facts = []
    for number, key in enumerate(keys):
        question, answer, wording, paraphrases = _RELATIONS[number % len(_RELATIONS)]
        place = places[number // len(_RELATIONS)]
        facts.append(
            Fact(
                (question.format(x=place), wording.format(x=place)),
                answer.format(x=place, y=key),
                tuple(text.format(x=place) for text in paraphrases),
                key,
            )
        )
    return facts
