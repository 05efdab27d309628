"""What a record of any format becomes, and the checks that all formats share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from typing import TYPE_CHECKING, Any

from chat.turns import Tool, Turn

if TYPE_CHECKING:
    from data_utils.files import Location

_SHOWN_WIDTH = 60
_SHOWN_ITEMS = 12
_SHOWN_LEVELS = 3
_MOST_LEVELS = 200
# Within what float32 and a mean over many tokens can bear.
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-6, 1e6


@dataclass(frozen=True)
class Conversation:
    """A checked record.

    Attributes:
        turns: at least one; a ``system`` turn only as the first, ``tool`` turns only behind the calls that they answer,
            in their order and one for each. Only the last turn's calls may have none.
        where: the place it came from.
        tools: descriptions of the functions that may be called.
    """

    turns: tuple[Turn, ...]
    where: Location | str
    tools: tuple[Tool, ...] = ()


class InvalidRecord(Exception):
    """Why a record is refused, and the fix. Its place is added where it is known, in ``Format.parse``."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


def is_empty(value: object) -> bool:
    """Whether a field holds nothing: ``null``, or an empty string, list or object. A number is never nothing."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def shown(value: object, width: int = _SHOWN_WIDTH) -> str:
    """A value for a message: one line without control characters, shortened without touching all of a large value."""
    text = repr(_clipped(value, width, _SHOWN_LEVELS))
    return text if len(text) <= width else f"{text[: width - 3]}..."


class _Dots:
    def __repr__(self) -> str:
        return "..."


def _clipped(value: object, width: int, levels: int) -> object:
    if isinstance(value, str):
        return value if len(value) <= width else value[:width] + "..."
    if isinstance(value, bytes):
        return value[:width]
    if isinstance(value, (list, dict)) and value and not levels:
        return _Dots()
    if isinstance(value, list):
        return [_clipped(item, width, levels - 1) for item in value[:_SHOWN_ITEMS]]
    if isinstance(value, dict):
        # Half the width: a long text must not hide the keys behind it.
        items = islice(value.items(), _SHOWN_ITEMS)
        return {_clipped(key, width, 0): _clipped(item, width // 2, levels - 1) for key, item in items}
    return value


def check_json(value: object, what: str) -> None:
    """Check a value that is to be written as JSON again.

    Args:
        what: its name, for the message.

    Raises:
        InvalidRecord: what JSON does not have (a date of a table, NaN), or nesting far beyond what anyone means, which Python's
            JSON might give up on.
    """
    level = [value]
    for _ in range(_MOST_LEVELS):
        inner: list[object] = []
        for item in level:
            if isinstance(item, list):
                inner += item
            elif isinstance(item, dict) and all(isinstance(key, str) for key in item):
                inner += item.values()
            elif not (item is None or isinstance(item, (str, int)) or (isinstance(item, float) and isfinite(item))):
                raise InvalidRecord(f"{what} holds {shown(item)}, which is no JSON", "Write it as a string or a number")
        if not inner:
            return
        level = inner
    raise InvalidRecord(f"{what} is nested more than {_MOST_LEVELS} levels deep", "Leave the record out")


Refusals = Mapping[str, tuple[str, str]]
"""Fields that would silently change the training if they were ignored: why they are refused, and the fix."""

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PREFERENCES = ("chosen", "rejected", "rejected_response", "kto_tag")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # the first is the one that is written
_WEIGHTS = ("train", "loss", "weight")

MEDIA_REFUSALS: Refusals = {name: ("only text can be trained on", "Leave the record out") for name in _MEDIA}
PREFERENCE_REFUSALS: Refusals = {
    name: (
        "preferences between answers cannot be trained on, only one answer to each question",
        "Keep the answer to train on, and remove this field",
    )
    for name in _PREFERENCES
}
RECORD_REFUSALS: Refusals = {
    **MEDIA_REFUSALS,
    **PREFERENCE_REFUSALS,
    **{
        name: (
            "it counts for a turn and would be ignored here",
            'Write it in a turn: {"role": "assistant", "content": "...", "weight": 0.5}; or rename the field',
        )
        for name in _WEIGHTS
    },
}
TURN_FIELDS = frozenset({*_MEDIA, *_THOUGHTS, *_WEIGHTS})
"""Fields of a turn, besides its author and text, that any format looks at."""


def refuse(fields: Mapping[str, Any], refusals: Refusals, owner: str) -> None:
    """Refuse fields that hold something.

    Args:
        owner: whose fields they are (``turn 2``), for the message.

    Raises:
        InvalidRecord: the first of them.
    """
    if refusals.keys().isdisjoint(fields):
        return
    for name, (why, fix) in refusals.items():
        if not is_empty(fields.get(name)):
            raise InvalidRecord(f'"{name}" ({shown(fields[name])}) in {owner}: {why}', fix)


def parse_weight(turn: Mapping[str, Any], owner: str) -> float | None:
    """What ``train``, its other name ``loss``, and ``weight`` of a turn say: see ``Turn.weight``.

    Raises:
        InvalidRecord: of another type, negative or infinite, or two that contradict each other.
    """
    train, weight = turn.get("train"), turn.get("weight")
    loss = turn.get("loss")
    for name, value in (("train", train), ("loss", loss)):
        if value is not None and not isinstance(value, bool):
            raise InvalidRecord(
                f'"{name}" of {owner} must be true or false, not {shown(value)}', 'A number is a "weight"'
            )
    if train is None:
        train = loss
    elif loss is not None and train != loss:
        raise InvalidRecord(f'"train" and "loss" of {owner} mean the same and differ', "Keep one of them")
    if weight is None:
        return None if train is None else float(train)
    if (
        isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not (weight == 0 or _LEAST_WEIGHT <= weight <= _MOST_WEIGHT)
    ):
        raise InvalidRecord(
            f'"weight" of {owner} must be 0, or a number from {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}, not '
            f"{shown(weight)}",
            "0 does not train the turn, 1 is as usual",
        )
    if train is not None and train != (weight > 0):
        said = "is to be trained" if train else "is not to be trained"
        raise InvalidRecord(f'{owner} {said}, and its "weight" of {shown(weight)} says otherwise', "Keep one of them")
    return float(weight)


def parse_thinking(turn: Mapping[str, Any], role: str, owner: str) -> str | None:
    """What the assistant thought, under any of the field's names: see ``Turn.thinking``. An empty field says nothing.

    Raises:
        InvalidRecord: no text, of someone else, or two that differ.
    """
    given = {name: turn[name] for name in _THOUGHTS if not is_empty(turn.get(name))}
    for name, value in given.items():
        if not isinstance(value, str):
            raise InvalidRecord(
                f'"{name}" of {owner} must be a string, not {shown(value)}', "Write the thinking as a string"
            )
        if role != "assistant":
            raise InvalidRecord(
                f'{owner} has "{name}" ({shown(value)}), and only the assistant thinks', "Remove the field"
            )
    if len(set(given.values())) > 1:
        names = " and ".join(f'"{name}"' for name in given)
        raise InvalidRecord(f"{names} of {owner} mean the same and differ", "Keep one of them")
    return next(iter(given.values()), None)


def with_system(record: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """The turns with the record's ``system`` field as the first one. An empty field says nothing.

    Raises:
        InvalidRecord: no text, or a system turn that says something else.
    """
    system = record.get("system")
    if is_empty(system):
        return turns
    if not isinstance(system, str):
        raise InvalidRecord(f'"system" must be a string, not {shown(system)}', "Write the text as a string")
    if turns[0].role != "system":
        return [Turn("system", system), *turns]
    if turns[0].content != system:
        raise InvalidRecord(f'the "system" field ({shown(system)}) and the system turn differ', "Keep one of them")
    return turns
