"""Placeholders in what is said and thought."""

from __future__ import annotations

from chat.turns import Turn
from data_utils.sources import fill_turns


def test_texts_and_thinking_are_filled() -> None:
    turns = [
        Turn("user", "I am {{ name }}, {{ who }}?"),
        Turn("assistant", "{{name}}", weight=0.5, thinking="{{name}} {{what}}"),
    ]
    assert fill_turns(turns, {"name": "{{who}}"}) == (
        (
            Turn("user", "I am {{who}}, {{ who }}?"),
            Turn("assistant", "{{who}}", weight=0.5, thinking="{{who}} {{what}}"),
        ),
        {"name", "who", "what"},
    )
