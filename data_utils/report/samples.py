"""Samples to show in a report: their tokens as text with role and weight, free of control characters.

All text comes from the user's data and is not trusted: ``visible`` is applied to every string that is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple, Protocol

from console import visible

Decode = Callable[[Sequence[int]], str]

# Tokens of a piece: a long sample is shortened in steps of this size.
_PIECE_TOKENS = 16
# Of a run of more than twice as many tokens, only so many at each end are decoded and kept.
_KEPT_END = 8192


class Encoded(Protocol):
    """The fields of ``data_utils.encode.EncodedConversation`` that reports read. A span is (length, role, weight)."""

    @property
    def input_ids(self) -> Sequence[int]: ...
    @property
    def spans(self) -> Sequence[tuple[int, str, float]]: ...
    @property
    def turns_dropped(self) -> int: ...


class SamplePiece(NamedTuple):
    """Consecutive tokens of a sample.

    Attributes:
        text: the decoded tokens; empty in a gap.
        role: of the turn; empty in a gap that spans several roles.
        weight: in the loss; 0 if not trained. The first token of a sample is never predicted, so its weight is 0.
        tokens: how many there are.
        kind: ``control`` for a control token that the renderer placed, ``gap`` for tokens that are not shown.
    """

    text: str
    role: str
    weight: float
    tokens: int
    kind: Literal["text", "control", "gap"] = "text"


@dataclass(frozen=True)
class Sample:
    """A conversation as the model sees it: its location, its source, its tokens in order."""

    where: str
    source: str
    pieces: tuple[SamplePiece, ...]

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    @property
    def trained_tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces if piece.weight > 0)


def build_sample(
    where: object, source: str, encoded: Encoded, decode: Decode, control_ids: Collection[int] = frozenset()
) -> Sample:
    """Build a sample to show.

    Args:
        where: its location in the data.
        source: the name of its source.
        decode: ids -> text; decoding two neighbouring runs must give the same text as decoding both together.
        control_ids: ids that only the renderer places, which tells them from the same text in a message.
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
        yield from (SamplePiece(text, role, weight, tokens) for text, tokens in _decode_chunks(head, decode))
        if hidden:
            yield SamplePiece("", role, weight, hidden, "gap")
        yield from (SamplePiece(text, role, weight, tokens) for text, tokens in _decode_chunks(tail, decode))


def _decode_chunks(ids: list[int], decode: Decode) -> Iterator[tuple[str, int]]:
    """Yield the text of a few tokens and their number; no character is split between two chunks."""
    start = 0
    while start < len(ids):
        end = start + _PIECE_TOKENS
        text = decode(ids[start:end])
        while text.endswith("\ufffd") and end < min(len(ids), start + 2 * _PIECE_TOKENS):
            end += 1
            text = decode(ids[start:end])
        end = min(end, len(ids))
        yield text, end - start
        start = end


def shorten(pieces: Sequence[SamplePiece], max_tokens: int) -> list[SamplePiece]:
    """Return about ``max_tokens`` tokens of a sample and gaps for the rest; neighbouring pieces of one kind are joined.

    The middle of long texts is left out first. If that is not enough, only the first and the last of the remaining
    pieces are shown.
    """
    shown = [piece.kind != "gap" for piece in pieces]
    if _count_shown(pieces, shown) > max_tokens:
        distances = _distances_to_ends(pieces)
        reach = max_tokens
        while _count_shown(pieces, shown) > max_tokens and reach >= _PIECE_TOKENS // 2:
            reach = reach * 3 // 4
            shown = [
                piece.kind != "gap" and distance <= reach for piece, distance in zip(pieces, distances, strict=True)
            ]
        if _count_shown(pieces, shown) > max_tokens:
            shown = _keep_both_ends(pieces, shown, max_tokens)
    gaps = (
        piece if is_shown else piece._replace(text="", kind="gap")
        for piece, is_shown in zip(pieces, shown, strict=True)
    )
    return _join(gaps)


def _count_shown(pieces: Sequence[SamplePiece], shown: Sequence[bool]) -> int:
    return sum(piece.tokens for piece, is_shown in zip(pieces, shown, strict=True) if is_shown)


def _distances_to_ends(pieces: Sequence[SamplePiece]) -> list[int]:
    """Return for each piece the tokens between it and the nearer end of its text (pieces of one role and weight)."""
    distances: list[int] = []
    for _, group in groupby(pieces, key=lambda piece: (piece.role, piece.weight)):
        sizes = [piece.tokens for piece in group]
        before, total = 0, sum(sizes)
        for size in sizes:
            distances.append(min(before, total - before - size))
            before += size
    return distances


def _keep_both_ends(pieces: Sequence[SamplePiece], shown: Sequence[bool], max_tokens: int) -> list[bool]:
    """Hide all but the first and the last pieces, half of the tokens at each end of the sample."""
    order = [index for index, is_shown in enumerate(shown) if is_shown]
    kept: set[int] = set()
    for side in (order, order[::-1]):
        room = max_tokens // 2
        for index in side:
            room -= pieces[index].tokens
            if room < 0:
                break
            kept.add(index)
    return [index in kept for index in range(len(pieces))]


def _join(pieces: Iterable[SamplePiece]) -> list[SamplePiece]:
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


def visible_line(text: object, max_length: int = 200) -> str:
    """Do the same for a name, location or reason, as one line. A long one keeps its start and its end."""
    line = str(text)
    if len(line) > max_length:
        line = f"{line[: max_length // 2]}…{line[len(line) - (max_length - max_length // 2 - 1) :]}"
    return visible(line).replace("\n", "␊").replace("\t", "␉")
