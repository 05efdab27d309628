"""What ``--data_path`` names: files or folders, how many of their records are taken, and how often.

``a.json`` takes every record once, ``a.json#500`` draws 500 of them, ``a.json@x2`` takes each twice, ``a.json@x0.3`` a
random 30 %, ``a.json#500@x2`` draws 500 and takes each of them twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from chat.turns import Turn
from errors import ConfigError

_SUFFIXES = re.compile(r"(?P<path>.+?)(#(?P<sample>\d+))?(@x(?P<factor>\d+(\.\d+)?|\.\d+))?")


@dataclass(frozen=True)
class Source:
    """One value of ``--data_path``.

    Attributes:
        name: as it was given.
        path: a file or a folder.
        sample: how many records are drawn; ``None`` is all.
        factor: how often each of them is taken.
    """

    name: str
    path: Path
    sample: int | None = None
    factor: float = 1.0


def parse_source(name: str, flag: str = "--data_path") -> Source:
    """Take a value of ``--data_path`` apart. A file that has the whole of it as its name is that file.

    Raises:
        ConfigError: no such file or folder, or a number that makes no sense.
    """
    path = Path(name)
    match = _SUFFIXES.fullmatch(name)
    source = Source(name, path)
    if match is not None and not path.exists():
        path, sample, factor = Path(match["path"]), match["sample"], match["factor"]
        source = Source(name, path, None if sample is None else int(sample), 1.0 if factor is None else float(factor))
    if not path.exists():
        what = f"{flag} {name}: there is no such file" + ("" if str(path) == name else f" as {path}")
        raise ConfigError(
            what, "Give a file of conversations or a folder of them; #N draws N records, @xF takes each F times"
        )
    if source.sample == 0 or source.factor == 0:
        raise ConfigError(f"{flag} {name} takes nothing", "Leave it out, or give more than 0")
    return source


class RecordSampler:
    """How often each record of a source is taken, asked record by record: for training, and for evaluation.

    The same seed makes the same choice. What is held out for evaluation is held out before records are repeated.

    Args:
        total: usable records of the source.
        eval_share: share of what is drawn that is held out, at least one record; 0 holds out nothing.
    """

    def __init__(self, source: Source, total: int, eval_share: float, seed: int) -> None:
        random = Random(f"{seed} {source.name}")
        drawn = total if source.sample is None else min(source.sample, total)
        held = min(max(1, round(drawn * eval_share)), drawn) if eval_share and drawn else 0
        whole, part = divmod(source.factor, 1)
        self._copies = int(whole)
        self._drawn = _Selection(random, drawn, total)
        self._held = _Selection(random, held, drawn)
        self._extra = _Selection(random, round((drawn - held) * part), drawn - held)

    def take(self) -> tuple[int, int]:
        """Of the next record: how many times it is trained, and how many times evaluated."""
        if not self._drawn.take():
            return 0, 0
        if self._held.take():
            return 0, 1
        return self._copies + self._extra.take(), 0


class _Selection:
    """``chosen`` of ``total`` things, each as likely, decided one by one in order (Knuth, TAOCP 2, algorithm S)."""

    def __init__(self, random: Random, chosen: int, total: int) -> None:
        self._random, self._chosen, self._left = random, chosen, total

    def take(self) -> bool:
        taken = self._random.random() * self._left < self._chosen
        self._left -= 1
        self._chosen -= taken
        return taken


def parse_fill(values: Iterable[str]) -> dict[str, str]:
    """The ``name=text`` pairs of ``--fill``.

    Raises:
        ConfigError: a value without ``=``, or a name that is given twice.
    """
    fill: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--fill {value} is no name=text", 'Write --fill name="the text"')
        if name.strip() in fill:
            raise ConfigError(f"--fill gives {name.strip()} twice", "Give each name once")
        fill[name.strip()] = text
    return fill


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
