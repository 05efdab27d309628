"""The geometry of a histogram in an SVG image: how many samples have how many tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

# In units of the drawing, which is about as wide on a phone.
_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, _WIDTH - 12, 46, _HEIGHT - 44
_BINS = 32


class Bar(NamedTuple):
    """A bar: its rectangle, and the samples with ``first`` to ``last`` tokens that it counts."""

    x: float
    y: float
    width: float
    height: float
    first: int
    last: int
    samples: int


class Histogram(NamedTuple):
    """A histogram to be drawn.

    Attributes:
        unit: the name of the horizontal axis.
        bars: one for each bin with samples.
        grid: height and label of each horizontal line.
        ticks: position and label on the horizontal axis.
        marks: position, top and label of each vertical line.
        note: one or more sentences below it, perhaps none.
    """

    title: str
    unit: str
    bars: list[Bar]
    grid: list[tuple[float, str]]
    ticks: list[tuple[float, str]]
    marks: list[tuple[float, int, str]]
    note: str
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _RIGHT
    bottom: int = _BOTTOM


def draw_histogram(
    title: str, unit: str, counts: Mapping[int, int], marks: Mapping[str, float] | None = None, note: str = ""
) -> Histogram:
    """Draw how many samples have which length; the longest 1% may be counted in the last bar, which the note says.

    Args:
        counts: samples of each length, at least one.
        marks: lengths to mark, by their label; one beyond the last bar is left out.
        note: a sentence to add.
    """
    step, bins = _bin(counts)
    end, highest = step * len(bins), max(bins)

    def x(value: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * value / end, 1)

    def y(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * value / highest, 1)

    bars = []
    for index, samples in enumerate(bins):
        if samples:
            first, after = index * step, (index + 1) * step
            width = round(max(0.8, x(after) - x(first) - 1), 1)
            bars.append(Bar(x(first), y(samples), width, round(_BOTTOM - y(samples), 1), first, after - 1, samples))
    shown_marks = sorted((marks or {}).items(), key=lambda mark: mark[1])
    longer = sum(samples for length, samples in counts.items() if length >= end)
    longest = f"{longer:,} longer ones, up to {max(counts):,}, stand in the last bar." if longer else ""
    return Histogram(
        title,
        unit,
        bars,
        grid=[(y(value), short_number(value)) for value in range(0, highest + 1, _round_up(highest / 4))],
        ticks=[(x(value), short_number(value)) for value in range(0, end + 1, _round_up(end / 5))],
        marks=_place_marks([(x(value), label) for label, value in shown_marks if value <= end]),
        note=f"{longest} {note}".strip(),
    )


def _bin(counts: Mapping[int, int]) -> tuple[int, Sequence[int]]:
    """The width of a bin in tokens, and the samples in each; up to twice the length that 99% do not exceed."""
    ordered = sorted(counts.items())
    total, up_to, end = sum(counts.values()), 0, ordered[-1][0]
    for length, count in ordered:
        up_to += count
        if up_to >= 0.99 * total:
            end = min(end, 2 * length)
            break
    step = _round_up(max(1, end + 1) / _BINS)
    bins = [0] * (end // step + 1)
    for length, count in ordered:
        bins[min(length // step, len(bins) - 1)] += count
    return step, bins


def _place_marks(marks: Iterable[tuple[float, str]]) -> list[tuple[float, int, str]]:
    """Marks in order, with the height of their labels: labels that would overlap alternate between two rows."""
    placed = []
    previous: float = -_WIDTH
    row = 0
    for x, label in marks:
        row = 1 - row if x - previous < 48 else 0
        placed.append((x, _TOP - 8 - 12 * row, label))
        previous = x
    return placed


def _round_up(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50... that is no less."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= least:
                return digit * power
        power *= 10


def short_number(number: int) -> str:
    """``950``, ``1.2k``, ``3.4M``."""
    for size, letter in ((1_000_000_000, "G"), (1_000_000, "M"), (1000, "k")):
        if number >= size:
            return f"{number / size:.1f}".removesuffix(".0") + letter
    return str(number)
