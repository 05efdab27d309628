"""Samples as people look at them: the text of each run of tokens, whose it is, whether it is trained.

Text comes from the user's data and is not trusted: ``visible`` is for every string that is shown anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple, Protocol

Decode = Callable[[list[int]], str]

# Tokens that are decoded together: what is left out of a long sample is left out in such steps.
_CHUNK = 16
# Of a run of more tokens than twice this, only so many at each end are kept at all.
_KEPT_END = 8192


class Encoded(Protocol):
    """What is read of a ``data_utils.encode.EncodedConversation``. A span is its length, role and weight."""

    @property
    def input_ids(self) -> list[int]: ...
    @property
    def spans(self) -> Sequence[tuple[int, str, float]]: ...
    @property
    def turns_dropped(self) -> int: ...


class SamplePiece(NamedTuple):
    """Part of a sample.

    Attributes:
        text: what its tokens say; nothing in a gap.
        role: whose text it is; empty in a gap over several.
        weight: in the loss; 0 is not trained. The first token of a sample is never predicted, so its weight is 0.
        tokens: how many it stands for.
        kind: ``control`` for a control token that the renderer placed, ``gap`` for tokens that are not shown.
    """

    text: str
    role: str
    weight: float
    tokens: int
    kind: Literal["text", "control", "gap"] = "text"


@dataclass(frozen=True)
class Sample:
    """A conversation as the model sees it: its place, its source, its tokens in order."""

    where: str
    source: str
    pieces: tuple[SamplePiece, ...]

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    @property
    def trained_tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces if piece.weight > 0)


def show_sample(
    where: object, source: str, encoded: Encoded, decode: Decode, control_ids: Collection[int] = frozenset()
) -> Sample:
    """A sample to look at.

    Args:
        where: its place in the data.
        source: the name of what it was read from.
        decode: ids -> text; the texts of neighbouring runs must make the text of both.
        control_ids: ids that only the renderer places, to tell them from the same text in a message.
    """
    pieces: list[SamplePiece] = []
    start = 0
    for length, role, weight in encoded.spans:
        ids = encoded.input_ids[start : start + length]
        if start == 0 and ids and weight > 0:
            pieces += _pieces(ids[:1], role, 0.0, decode, control_ids)
            ids = ids[1:]
        pieces += _pieces(ids, role, weight, decode, control_ids)
        start += length
    return Sample(str(where), source, tuple(pieces))


def _pieces(
    ids: Sequence[int], role: str, weight: float, decode: Decode, control_ids: Collection[int]
) -> Iterator[SamplePiece]:
    for is_control, group in groupby(ids, key=lambda id_: id_ in control_ids):
        run = list(group)
        if is_control:
            yield from (SamplePiece(decode([id_]), role, weight, 1, "control") for id_ in run)
            continue
        hidden = max(0, len(run) - 2 * _KEPT_END)
        head, tail = (run[:_KEPT_END], run[-_KEPT_END:]) if hidden else (run, [])
        yield from (SamplePiece(text, role, weight, tokens) for text, tokens in _chunks(head, decode))
        if hidden:
            yield SamplePiece("", role, weight, hidden, "gap")
        yield from (SamplePiece(text, role, weight, tokens) for text, tokens in _chunks(tail, decode))


def _chunks(ids: list[int], decode: Decode) -> Iterator[tuple[str, int]]:
    """Texts of a few tokens each and how many, not parted within a character."""
    start = 0
    while start < len(ids):
        end = start + _CHUNK
        text = decode(ids[start:end])
        while text.endswith("\ufffd") and end < min(len(ids), start + 2 * _CHUNK):
            end += 1
            text = decode(ids[start:end])
        end = min(end, len(ids))
        yield text, end - start
        start = end


def shorten(pieces: Sequence[SamplePiece], limit: int) -> list[SamplePiece]:
    """At most about ``limit`` tokens of a sample, neighbours of one kind joined, and gaps for the rest.

    What goes first is the middle of long texts: the start and the end of each text, trained or not, stay as long as
    there is room, then those of the first and the last texts.
    """
    shown = [piece.kind != "gap" for piece in pieces]
    if _tokens(pieces, shown) > limit:
        distances = _distances(pieces)
        reach = limit
        while _tokens(pieces, shown) > limit and reach >= _CHUNK // 2:
            reach = reach * 3 // 4
            shown = [
                piece.kind != "gap" and distance <= reach for piece, distance in zip(pieces, distances, strict=True)
            ]
        if _tokens(pieces, shown) > limit:
            shown = _both_ends(pieces, shown, limit)
    gaps = (
        piece if is_shown else piece._replace(text="", kind="gap")
        for piece, is_shown in zip(pieces, shown, strict=True)
    )
    return _joined(gaps)


def _tokens(pieces: Sequence[SamplePiece], shown: Sequence[bool]) -> int:
    return sum(piece.tokens for piece, is_shown in zip(pieces, shown, strict=True) if is_shown)


def _distances(pieces: Sequence[SamplePiece]) -> list[int]:
    """Tokens between each piece and the nearer end of the text it belongs to."""
    distances: list[int] = []
    for _, group in groupby(pieces, key=lambda piece: (piece.role, piece.weight)):
        sizes = [piece.tokens for piece in group]
        before, total = 0, sum(sizes)
        for size in sizes:
            distances.append(min(before, total - before - size))
            before += size
    return distances


def _both_ends(pieces: Sequence[SamplePiece], shown: Sequence[bool], limit: int) -> list[bool]:
    order = [index for index, is_shown in enumerate(shown) if is_shown]
    kept: set[int] = set()
    for side in (order, order[::-1]):
        room = limit // 2
        for index in side:
            room -= pieces[index].tokens
            if room < 0:
                break
            kept.add(index)
    return [index in kept for index in range(len(pieces))]


def _joined(pieces: Iterable[SamplePiece]) -> list[SamplePiece]:
    joined: list[SamplePiece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is None or last.kind != piece.kind or piece.kind == "control":
            joined.append(piece)
        elif (last.role, last.weight) == (piece.role, piece.weight):
            joined[-1] = last._replace(text=last.text + piece.text, tokens=last.tokens + piece.tokens)
        elif piece.kind == "gap":
            joined[-1] = SamplePiece("", "", 0.0, last.tokens + piece.tokens, "gap")
        else:
            joined.append(piece)
    return joined


def _stand_ins() -> dict[int, str]:
    """Characters that steer a terminal or turn text around, and what is shown for them."""
    table = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "␡"}
    table |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
    turning = [0x61C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    return table | {code: f"\\u{code:04x}" for code in [*turning, *range(0xD800, 0xE000)]}


_STAND_INS = _stand_ins()


def visible(text: str) -> str:
    """The text with everything visible that could steer a terminal or a browser, apart from newlines and tabs."""
    return text.translate(_STAND_INS)


def visible_line(text: object, most: int = 200) -> str:
    """The same in one line: a name, a place or a reason. A long one keeps its start and its end."""
    line = str(text)
    if len(line) > most:
        line = f"{line[: most // 2]}…{line[len(line) - (most - most // 2 - 1) :]}"
    return visible(line).replace("\n", "␊").replace("\t", "␉")
