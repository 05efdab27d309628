"""Conversations as parsed from records of any format, and the checks that all formats share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from typing import TYPE_CHECKING, Any

from chat.turns import Tool, Turn

if TYPE_CHECKING:
    from data_utils.files import Location

Record = dict[str, Any]
ParsedRecord = tuple[list[Turn], tuple[Tool, ...]]

_SHOWN_WIDTH = 60
_SHOWN_ITEMS = 12
_SHOWN_LEVELS = 3
_MAX_LEVELS = 200
# The range that float32 and a mean over many tokens can represent.
_MIN_WEIGHT, _MAX_WEIGHT = 1e-6, 1e6


@dataclass(frozen=True)
class Conversation:
    """A checked record.

    Attributes:
        turns: at least one; a ``system`` turn only as the first; after a turn with calls one ``tool`` turn for each, in
            the same order. Only calls of the last turn may have no results.
        where: the location of the record.
        tools: descriptions of the functions that may be called.
    """

    turns: tuple[Turn, ...]
    where: Location | str
    tools: tuple[Tool, ...] = ()


class InvalidRecord(Exception):
    """A record that is refused: the reason and the fix. ``Format.parse`` adds the location."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


def is_empty(value: object) -> bool:
    """Return whether a value is ``null``, or an empty string, list or object. Numbers are never empty."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def short_repr(value: object, width: int = _SHOWN_WIDTH) -> str:
    """Format a value for a message: one line without control characters. Only the start of a large value is read."""
    text = repr(_clip(value, width, _SHOWN_LEVELS))
    return text if len(text) <= width else f"{text[: width - 3]}..."


class _Ellipsis:
    def __repr__(self) -> str:
        return "..."


def _clip(value: object, width: int, levels: int) -> object:
    if isinstance(value, str):
        return value if len(value) <= width else value[:width] + "..."
    if isinstance(value, bytes):
        return value[:width]
    if isinstance(value, (list, dict)) and value and not levels:
        return _Ellipsis()
    if isinstance(value, list):
        return [_clip(item, width, levels - 1) for item in value[:_SHOWN_ITEMS]]
    if isinstance(value, dict):
        # Half the width, so that a long text does not hide the keys after it.
        items = islice(value.items(), _SHOWN_ITEMS)
        return {_clip(key, width, 0): _clip(item, width // 2, levels - 1) for key, item in items}
    return value


def check_json(value: object, what: str) -> None:
    """Check that a value can be written as JSON.

    Args:
        what: its name, for the message.

    Raises:
        InvalidRecord: a value that JSON does not have (a date of a table, NaN), or nesting so deep that Python's JSON
            module could fail.
    """
    level = [value]
    for _ in range(_MAX_LEVELS):
        inner: list[object] = []
        for item in level:
            if isinstance(item, list):
                inner += item
            elif isinstance(item, dict) and all(isinstance(key, str) for key in item):
                inner += item.values()
            elif not (item is None or isinstance(item, (str, int)) or (isinstance(item, float) and isfinite(item))):
                raise InvalidRecord(
                    f"{what} contains {short_repr(item)}, which is not JSON", "Write it as a string or a number"
                )
        if not inner:
            return
        level = inner
    raise InvalidRecord(f"{what} is nested more than {_MAX_LEVELS} levels deep", "Remove the record")


UnsupportedFields = Mapping[str, tuple[str, str]]
"""Fields that would silently change the training if they were ignored: the reason to refuse them, and the fix."""

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PREFERENCES = ("chosen", "rejected", "rejected_response", "kto_tag")
_THINKING = ("reasoning_content", "reasoning", "thinking")  # the first is used for writing
_WEIGHTS = ("train", "loss", "weight")

UNSUPPORTED_MEDIA: UnsupportedFields = {name: ("only text can be trained on", "Remove the record") for name in _MEDIA}
UNSUPPORTED_PREFERENCES: UnsupportedFields = {
    name: (
        "preferences between answers cannot be trained on, only one answer to each question",
        "Keep the answer to train on, and remove this field",
    )
    for name in _PREFERENCES
}
UNSUPPORTED_IN_RECORDS: UnsupportedFields = {
    **UNSUPPORTED_MEDIA,
    **UNSUPPORTED_PREFERENCES,
    **{
        name: (
            "it applies to a turn and would be ignored here",
            'Write it in a turn: {"role": "assistant", "content": "...", "weight": 0.5}; or rename the field',
        )
        for name in _WEIGHTS
    },
}
TURN_FIELDS = frozenset({*_MEDIA, *_THINKING, *_WEIGHTS})
"""Fields of a turn, besides author and text, that every format reads or refuses."""


def check_unsupported(fields: Mapping[str, Any], unsupported: UnsupportedFields, owner: str) -> None:
    """Check that unsupported fields are absent or empty.

    Args:
        owner: the object that has the fields (``turn 2``), for the message.

    Raises:
        InvalidRecord: the first field that is not empty.
    """
    if unsupported.keys().isdisjoint(fields):
        return
    for name, (why, fix) in unsupported.items():
        if not is_empty(fields.get(name)):
            raise InvalidRecord(f'"{name}" ({short_repr(fields[name])}) in {owner}: {why}', fix)


def parse_weight(turn: Mapping[str, Any], owner: str) -> float | None:
    """Return the weight that ``train`` (or ``loss``, its other name) and ``weight`` give a turn, see ``Turn.weight``.

    Raises:
        InvalidRecord: another type, a weight out of range, or two fields that contradict each other.
    """
    train, weight = turn.get("train"), turn.get("weight")
    loss = turn.get("loss")
    for name, value in (("train", train), ("loss", loss)):
        if value is not None and not isinstance(value, bool):
            raise InvalidRecord(
                f'"{name}" of {owner} must be true or false, not {short_repr(value)}', 'Use "weight" for a number'
            )
    if train is None:
        train = loss
    elif loss is not None and train != loss:
        raise InvalidRecord(f'"train" and "loss" of {owner} have the same meaning but differ', "Keep one of them")
    if weight is None:
        return None if train is None else float(train)
    if (
        isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not (weight == 0 or _MIN_WEIGHT <= weight <= _MAX_WEIGHT)
    ):
        raise InvalidRecord(
            f'"weight" of {owner} must be 0, or a number from {_MIN_WEIGHT:g} to {_MAX_WEIGHT:g}, not '
            f"{short_repr(weight)}",
            "0 does not train the turn, 1 is the default",
        )
    if train is not None and train != (weight > 0):
        marked = "trained" if train else "not trained"
        raise InvalidRecord(
            f'{owner} is marked as {marked}, but its "weight" is {short_repr(weight)}', "Keep one of them"
        )
    return float(weight)


def parse_thinking(turn: Mapping[str, Any], role: str, owner: str) -> str | None:
    """Return the reasoning of an assistant turn, under any of its names, see ``Turn.thinking``. Empty is ``None``.

    Raises:
        InvalidRecord: not a string, in a turn of another role, or under two names with different texts.
    """
    texts = {name: turn[name] for name in _THINKING if not is_empty(turn.get(name))}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise InvalidRecord(
                f'"{name}" of {owner} must be a string, not {short_repr(value)}', "Write the reasoning as a string"
            )
        if role != "assistant":
            raise InvalidRecord(
                f'{owner} has "{name}" ({short_repr(value)}), which only assistant turns can have', "Remove the field"
            )
    if len(set(texts.values())) > 1:
        names = " and ".join(f'"{name}"' for name in texts)
        raise InvalidRecord(f"{names} of {owner} have the same meaning but differ", "Keep one of them")
    return next(iter(texts.values()), None)


def prepend_system(record: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """Return the turns with the record's ``system`` field, if it is not empty, as the first one.

    Raises:
        InvalidRecord: not a string, or different from a system turn that is there already.
    """
    system = record.get("system")
    if is_empty(system):
        return turns
    if not isinstance(system, str):
        raise InvalidRecord(f'"system" must be a string, not {short_repr(system)}', "Write the text as a string")
    if turns[0].role != "system":
        return [Turn("system", system), *turns]
    if turns[0].content != system:
        raise InvalidRecord(f'the "system" field ({short_repr(system)}) and the system turn differ', "Keep one of them")
    return turns
