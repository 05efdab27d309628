"""The values of ``--data_path``: files or folders, how many of their records are drawn, and how often each is used.

``a.json`` uses every record once, ``a.json#500`` draws 500 of them, ``a.json@x2`` uses each twice, ``a.json@x0.3`` uses
a random 30 %, ``a.json#500@x2`` draws 500 and uses each of them twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from chat.turns import TEXT, Turn
from data_utils.files import check_readable
from errors import ConfigError, DataError

_SUFFIXES = re.compile(r"(?P<path>.+?)(#(?P<sample>\d{1,18}))?(@x(?P<factor>\d+(\.\d+)?|\.\d+))?", re.DOTALL)
_MAX_FACTOR = 10_000


@dataclass(frozen=True)
class Source:
    """One value of ``--data_path``.

    Attributes:
        name: the value itself.
        path: a file or a folder.
        sample: number of records to draw; ``None`` uses all.
        factor: number of times each of them is used.
    """

    name: str
    path: Path
    sample: int | None = None
    factor: float = 1.0

    @property
    def is_drawn(self) -> bool:
        """Whether the seed decides which of its records are used."""
        return self.sample is not None or self.factor % 1 != 0


def parse_source(name: str, flag: str = "--data_path") -> Source:
    """Parse a value of ``--data_path``. If a file with the whole value as its name exists, it is that file.

    Raises:
        ConfigError: no such file or folder, something else of that name, or a number or factor out of range.
    """
    if not name:
        raise ConfigError(f"{flag} is empty", "Give a file of conversations or a folder of them")
    path = Path(name)
    match = _SUFFIXES.fullmatch(name)
    source = Source(name, path)
    if match is not None and not _exists(path):
        path, sample, factor = Path(match["path"]), match["sample"], match["factor"]
        source = Source(name, path, None if sample is None else int(sample), 1.0 if factor is None else float(factor))
    if not _exists(path):
        what = f"{flag} {name}: there is no such file" + ("" if str(path) == name else f" as {path}")
        raise ConfigError(
            what, "Give a file of conversations or a folder of them; #N draws N records, @xF takes each F times"
        )
    try:
        check_readable(path)
    except DataError as error:
        raise ConfigError(f"{flag} {error}") from None
    if source.sample == 0 or source.factor == 0:
        raise ConfigError(f"{flag} {name} takes nothing", "Leave it out, or give more than 0")
    if source.factor > _MAX_FACTOR:
        raise ConfigError(f"{flag} {name} takes each record too often", f"Give at most @x{_MAX_FACTOR}")
    return source


def _exists(path: Path) -> bool:
    """Return whether there is something at a path, or may be something that cannot be read."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True


class RecordSampler:
    """Decides, record by record, how often each record of a source is used for training and for evaluation.

    The same seed makes the same choice. Records are held out for evaluation before the others are repeated.

    Args:
        total: number of usable records of the source.
        eval_share: share of the drawn records that is held out, at least one record; 0 holds out none.
    """

    def __init__(self, source: Source, total: int, eval_share: float, seed: int) -> None:
        # As bytes, because a name may not be UTF-8; the same text gives the same numbers.
        random = Random(f"{seed} {source.name}".encode("utf-8", "surrogateescape"))
        drawn = total if source.sample is None else min(source.sample, total)
        held_out = min(max(1, round(drawn * eval_share)), drawn) if eval_share and drawn else 0
        whole, fraction = divmod(source.factor, 1)
        self._copies = int(whole)
        self._takes_all = drawn == total and not held_out and not fraction
        self._drawn = _Selection(random, drawn, total)
        self._held_out = _Selection(random, held_out, drawn)
        self._extra = _Selection(random, round((drawn - held_out) * fraction), drawn - held_out)

    def next_copies(self) -> tuple[int, int]:
        """Return how many times the next record is used for training, and how many times for evaluation."""
        if self._takes_all:
            return self._copies, 0
        if not self._drawn.selects_next():
            return 0, 0
        if self._held_out.selects_next():
            return 0, 1
        return self._copies + self._extra.selects_next(), 0


class _Selection:
    """A random choice of ``chosen`` out of ``total`` items, decided item by item (Knuth, TAOCP 2, algorithm S)."""

    def __init__(self, random: Random, chosen: int, total: int) -> None:
        self._random, self._chosen, self._left = random, chosen, total

    def selects_next(self) -> bool:
        is_selected = self._random.random() * self._left < self._chosen
        self._left -= 1
        self._chosen -= is_selected
        return is_selected


def parse_fill(values: Iterable[str]) -> dict[str, str]:
    """Parse the ``name=text`` pairs of ``--fill``.

    Raises:
        ConfigError: a value without ``=`` or name, or a repeated name.
    """
    fill: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--fill {value} is not name=text", 'Write --fill name="the text"')
        if name.strip() in fill:
            raise ConfigError(f"--fill gives {name.strip()} twice", "Give each name once")
        fill[name.strip()] = text
    return fill


_PLACEHOLDER = re.compile(r"\{\{\s*([^\W\d]\w*)\s*\}\}")


def fill_turns(turns: Sequence[Turn], fill: Mapping[str, str]) -> tuple[tuple[Turn, ...], set[str]]:
    """Return the turns with every placeholder of ``fill`` replaced, and the names of all placeholders found.

    Replacements are not searched for placeholders, and control tokens in them stay text. A plain text has none.
    """
    found: set[str] = set()
    if not any("{{" in turn.content or "{{" in (turn.thinking or "") for turn in turns):
        return tuple(turns), found

    def replacement(match: re.Match[str]) -> str:
        found.add(match[1])
        return fill.get(match[1], match[0])

    def filled(text: str) -> str:
        return _PLACEHOLDER.sub(replacement, text) if "{{" in text else text

    return tuple(
        turn
        if turn.role == TEXT
        else turn._replace(
            content=filled(turn.content), thinking=None if turn.thinking is None else filled(turn.thinking)
        )
        for turn in turns
    ), found
