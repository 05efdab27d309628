"""``{{name}}`` in messages, and the texts that ``--fill`` puts there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qwen_model.turns import Turn

_PLACEHOLDER = re.compile(r"\{\{\s*([^\W\d]\w*)\s*\}\}")


def fill_turns(turns: Sequence[Turn], fill: Mapping[str, str]) -> tuple[tuple[Turn, ...], set[str]]:
    """The turns with every placeholder of ``fill`` replaced, and the names of all that were found.

    What is put in is not searched again, and stays text.
    """
    found: set[str] = set()

    def replacement(match: re.Match[str]) -> str:
        found.add(match[1])
        return fill.get(match[1], match[0])

    def filled(text: str) -> str:
        return _PLACEHOLDER.sub(replacement, text) if "{{" in text else text

    return tuple(
        turn._replace(content=filled(turn.content), thinking=None if turn.thinking is None else filled(turn.thinking))
        for turn in turns
    ), found
