"""The geometry of a histogram for an SVG image: number of samples by length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

# In units of the SVG image; a phone's screen is about as wide.
_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, _WIDTH - 12, 46, _HEIGHT - 44
_BINS = 32


class Bar(NamedTuple):
    """A bar: its rectangle, and the number of samples with ``first`` to ``last`` tokens."""

    x: float
    y: float
    width: float
    height: float
    first: int
    last: int
    samples: int


class Histogram(NamedTuple):
    """A histogram in the coordinates of an SVG image.

    Attributes:
        unit: label of the horizontal axis.
        bars: one for each bin that is not empty.
        grid: y and label of each horizontal line.
        ticks: x and label of each tick of the horizontal axis.
        marks: x, top and label of each vertical line.
        note: sentences below the image; may be empty.
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


def build_histogram(
    title: str, unit: str, counts: Mapping[int, int], marks: Mapping[str, float] | None = None, note: str = ""
) -> Histogram:
    """Build the histogram of samples by length. Up to 1% of them, if much longer, are counted in the last bar.

    Args:
        counts: number of samples of each length, not empty.
        marks: lengths to mark, by label; those beyond the last bar are left out.
        note: a sentence to add to the note.
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
    longest = f"{longer:,} longer ones, up to {max(counts):,}, are counted in the last bar." if longer else ""
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
    """Return the width of a bin in tokens, and the samples in each bin; up to twice the 99% percentile of lengths."""
    ordered = sorted(counts.items())
    total, cumulated, end = sum(counts.values()), 0, ordered[-1][0]
    for length, count in ordered:
        cumulated += count
        if cumulated >= 0.99 * total:
            end = min(end, 2 * length)
            break
    step = _round_up(max(1, end + 1) / _BINS)
    bins = [0] * (end // step + 1)
    for length, count in ordered:
        bins[min(length // step, len(bins) - 1)] += count
    return step, bins


def _place_marks(marks: Iterable[tuple[float, str]]) -> list[tuple[float, int, str]]:
    """Add the y of their labels to marks sorted by x: labels that would overlap alternate between two rows."""
    placed = []
    previous: float = -_WIDTH
    row = 0
    for x, label in marks:
        row = 1 - row if x - previous < 48 else 0
        placed.append((x, _TOP - 8 - 12 * row, label))
        previous = x
    return placed


def _round_up(least: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50... that is not less than ``least``."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= least:
                return digit * power
        power *= 10


def short_number(number: int) -> str:
    """Format a number as ``950``, ``1.2k`` or ``3.4M``."""
    for size, letter in ((1_000_000_000, "G"), (1_000_000, "M"), (1000, "k")):
        if number >= size:
            return f"{number / size:.1f}".removesuffix(".0") + letter
    return str(number)
