"""Conversations as parsed from records of any format, and the checks that all formats share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import isfinite
from typing import TYPE_CHECKING, Any

from chat.turns import TEXT, Tool, Turn

if TYPE_CHECKING:
    from data_utils.location import Location

Record = dict[str, Any]
ParsedRecord = tuple[list[Turn], tuple[Tool, ...]]
Notes = set[str]
"""What was read in a record that its author may not have meant, as sentences that follow "conversations ..."."""

NULLS_LEFT_OUT = (
    "have null fields in tools or arguments, which are left out as those of a table (as JSON text they are kept)"
)
ARGUMENTS_NOT_OBJECTS = "call functions with arguments that are not a JSON object"
PARAMETERS_NOT_OBJECTS = "describe tools with parameters that are not a JSON object"
UNDECLARED_CALLS = "call functions that none of their tools describes"

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
        notes: see ``Notes``; sorted.
        is_continued: a plain text that goes on in the next record, so that no end of text follows it.
    """

    turns: tuple[Turn, ...]
    where: Location | str
    tools: tuple[Tool, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)
    is_continued: bool = False

    @property
    def is_text(self) -> bool:
        """Whether it is a plain text, the only turn."""
        return bool(self.turns) and self.turns[0].role == TEXT


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
_PREFERENCES = (
    "chosen", "rejected", "rejected_response", "rejected_messages", "chosen_messages", "preferred_output",
    "non_preferred_output", "kto_tag",
)  # fmt: skip
_THINKING = ("reasoning_content", "reasoning", "thinking")  # the first is used for writing
_FLAGS = ("train", "loss")
_NUMBERS = ("weight", "loss_weight", "loss_scale")  # the first is used for writing
_WEIGHTS = (*_FLAGS, *_NUMBERS)
_TOOLS = ("tools", "functions")

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
UNSUPPORTED_IN_TURNS: UnsupportedFields = {
    **UNSUPPORTED_MEDIA,
    **{name: ("tools belong to the record", "Write them beside the list of turns") for name in _TOOLS},
    "train_detail": ("parts of a turn cannot be trained", 'Split the turn, or remove the field and give it a "weight"'),
}
SYSTEM_FIELDS = ("system", "system_prompt")
"""Fields of a record that contain its system message."""

WEIGHT_FIELDS = _WEIGHTS
"""Fields of a turn or a plain text that give it a weight."""

READ_IN_TURNS = frozenset({*_THINKING, *_WEIGHTS})
"""Fields of a turn, besides author and text, that every format reads."""

TURN_FIELDS = READ_IN_TURNS | UNSUPPORTED_IN_TURNS.keys()
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
    """Return the weight that the fields of a turn give it, see ``Turn.weight``.

    ``train`` (or ``loss``, its other name) is true or false; ``weight`` (or ``loss_weight``, ``loss_scale``) a number.

    Raises:
        InvalidRecord: another type, a weight out of range, or two fields that contradict each other.
    """
    flag_name, train = _one_of(turn, _FLAGS, owner)
    if train is not None and not isinstance(train, bool):
        raise InvalidRecord(
            f'"{flag_name}" of {owner} must be true or false, not {short_repr(train)}', 'Use "weight" for a number'
        )
    name, weight = _one_of(turn, _NUMBERS, owner)
    if weight is None:
        return None if train is None else float(train)
    if (
        isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not (weight == 0 or _MIN_WEIGHT <= weight <= _MAX_WEIGHT)
    ):
        raise InvalidRecord(
            f'"{name}" of {owner} must be 0, or a number from {_MIN_WEIGHT:g} to {_MAX_WEIGHT:g}, not '
            f"{short_repr(weight)}",
            "0 does not train the turn, 1 is the default",
        )
    if train is not None and train != (weight > 0):
        marked = "trained" if train else "not trained"
        raise InvalidRecord(
            f'{owner} is marked as {marked}, but its "{name}" is {short_repr(weight)}', "Keep one of them"
        )
    return float(weight) or 0.0  # -0.0 would be another weight


def _one_of(turn: Mapping[str, Any], names: Sequence[str], owner: str) -> tuple[str, Any]:
    """Return the name and value of the field that a turn has, of several with the same meaning; else a null.

    Raises:
        InvalidRecord: two of them, with different values.
    """
    given = {name: value for name in names if (value := turn.get(name)) is not None}
    name, value = next(iter(given.items()), (names[0], None))
    for other, item in given.items():
        is_same = item is value or (item == value and isinstance(item, bool) == isinstance(value, bool))
        if not is_same:
            what = f'"{name}" and "{other}" of {owner} have the same meaning but differ'
            raise InvalidRecord(what, "Keep one of them")
    return name, value


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
    """Return the turns with the record's ``system`` (or ``system_prompt``), if it is not empty, as the first one.

    Raises:
        InvalidRecord: not a string, or different from a system turn that is there already.
    """
    for name in SYSTEM_FIELDS:
        system = record.get(name)
        if system is None or is_empty(system):
            continue
        if not isinstance(system, str):
            raise InvalidRecord(f'"{name}" must be a string, not {short_repr(system)}', "Write the text as a string")
        if turns[0].role != "system":
            turns = [Turn("system", system), *turns]
        elif turns[0].content != system:
            what = f'the "{name}" field ({short_repr(system)}) and the system turn differ'
            raise InvalidRecord(what, "Keep one of them")
    return turns
