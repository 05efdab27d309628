"""The counts of one source of a run's data: what was read, what became of it, which tokens are trained.

It is fed one conversation at a time and does not grow with the data: counts, the first places of each kind, how many
samples have which length. Exact copies are found through a temporary file.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import groupby
from typing import Any

from chat.turns import Turn
from data_utils.report.counts import OTHERS, SAME_AS, DuplicateIndex, ReasonCounts
from data_utils.report.samples import Encoded, visible_line

TOO_LONG = "too long"
PERCENTILES = (5, 25, 50, 75, 95, 99)


@dataclass
class SourceReport:
    """What became of one source, fed one conversation at a time. ``read == kept + skipped.total``, always.

    Attributes:
        name: as the user wrote it, ``a.json#500@x2``.
        format: conversations, messages, alpaca or pairs.
        in_file: records in its files.
        read: conversations taken from it; one that is taken three times is three, here and in all counts below.
        skipped: by reason.
        truncated: those kept that were shortened, by how.
        duplicates: exact copies of an earlier sample of the set; repeats that were asked for are none.
        distinct: samples that are no copies.
        answers: answers of the samples that may be trained; ``empty_answers`` say nothing.
        unfilled: samples with a placeholder as it stands, by its name.
        tokens: all ids; ``tokens_by_role`` says whose.
        trained_tokens: those that are learnt (weight > 0, not the first of a sample); ``trained_weight`` adds up their
            weights.
        lengths: samples of each length; ``trained_lengths`` of each number of trained tokens.
    """

    name: str
    format: str = ""
    in_file: int = 0
    read: int = 0
    kept: int = 0
    distinct: int = 0
    answers: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    trained_weight: float = 0.0
    tokens_by_role: Counter[str] = field(default_factory=Counter)
    trained_by_role: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    trained_lengths: Counter[int] = field(default_factory=Counter)
    skipped: ReasonCounts = field(default_factory=ReasonCounts)
    truncated: ReasonCounts = field(default_factory=ReasonCounts)
    duplicates: ReasonCounts = field(default_factory=ReasonCounts)
    empty_answers: ReasonCounts = field(default_factory=ReasonCounts)
    unfilled: ReasonCounts = field(default_factory=ReasonCounts)
    seen: DuplicateIndex = field(default_factory=DuplicateIndex, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.name = visible_line(self.name)

    def skip(self, where: object, reason: str, times: int = 1) -> None:
        """Count a conversation that is left out."""
        self.read += times
        self.skipped.add(reason, where, times)

    def keep(
        self,
        where: object,
        encoded: Encoded,
        unfilled: Iterable[str] = (),
        times: int = 1,
        *,
        turns: Sequence[Turn] = (),
        truncated: str | None = None,
    ) -> None:
        """Count a sample, once for each distinct record.

        Args:
            unfilled: names of placeholders that stand in it.
            times: how many times it is taken.
            turns: its conversation, to find answers that are empty.
            truncated: how it was shortened, if it was; ``encoded.turns_dropped`` says so as well.
        """
        length = len(encoded.input_ids)
        assert times > 0 and length == sum(span[0] for span in encoded.spans), "spans that are not the ids"
        self.read += times
        self.kept += times
        self.tokens += length * times
        self.lengths[length] += times
        self._count_spans(encoded.spans, times)
        if truncated is not None or encoded.turns_dropped:
            self.truncated.add(truncated or TOO_LONG, where, times)
        for name in unfilled:
            self.unfilled.add(name, where, times)
        answers = [turn for turn in turns if turn.role == "assistant" and turn.weight != 0]
        empty = sum(not turn.content.strip() and not turn.calls for turn in answers)
        self.answers += len(answers) * times
        if empty:
            self.empty_answers.add("empty answer", where, empty * times)
        first = self.seen.first_place(_digest(encoded), visible_line(where))
        if first is None:
            self.distinct += 1
        else:
            self.duplicates.add("exact copy", f"{where}{SAME_AS}{first}")

    def _count_spans(self, spans: Sequence[tuple[int, str, float]], times: int) -> None:
        start = trained_tokens = 0
        for length, role, weight in spans:
            self.tokens_by_role[role] += length * times
            # The first token of a sample is never predicted.
            trained = length - (start == 0 and length > 0) if weight > 0 else 0
            if trained:
                self.trained_by_role[role] += trained * times
                self.trained_weight += trained * weight * times
                trained_tokens += trained
            start += length
        self.trained_tokens += trained_tokens * times
        self.trained_lengths[trained_tokens] += times

    def length_summary(self) -> dict[str, float]:
        """``min``, ``5%`` ... ``99%``, ``max`` and ``mean`` of the samples' lengths; empty without samples.

        A percentile is the shortest length that at least so many of the samples do not exceed.
        """
        if not self.kept:
            return {}
        ordered = sorted(self.lengths.items())
        summary: dict[str, float] = {"min": ordered[0][0]}
        wanted, up_to = list(PERCENTILES), 0
        for length, count in ordered:
            up_to += count
            while wanted and up_to * 100 >= wanted[0] * self.kept:
                summary[f"{wanted.pop(0)}%"] = length
        return summary | {"max": ordered[-1][0], "mean": round(self.tokens / self.kept, 1)}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: counts, and the first 100 places of each reason."""
        assert self.read == self.kept + self.skipped.total, f"{self.name}: read is not kept + skipped"
        return {
            "path": self.name,
            "format": self.format,
            "in_file": self.in_file,
            "read": self.read,
            "kept": self.kept,
            "skipped": self.skipped.total,
            "truncated": self.truncated.total,
            "duplicates": self.duplicates.total,
            "answers": self.answers,
            "empty_answers": self.empty_answers.total,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "trained_weight": round(self.trained_weight, 6),
            "tokens_by_role": dict(sorted(self.tokens_by_role.items())),
            "trained_by_role": dict(sorted(self.trained_by_role.items())),
            "lengths": self.length_summary(),
            "skipped_by_reason": dict(self.skipped.counts),
            "truncated_by_kind": dict(self.truncated.counts),
            "unfilled": dict(self.unfilled.counts),
            "skipped_at": [{"where": at, "reason": why} for why, all_ in self.skipped.places.items() for at in all_],
            "truncated_at": _all_places(self.truncated),
            "duplicates_at": _all_places(self.duplicates),
            "empty_answers_at": _all_places(self.empty_answers),
            "unfilled_at": _all_places(self.unfilled),
        }

    def warnings(self, places: bool = True) -> list[str]:
        """A line for each kind of loss or doubt: how many conversations, why, and the first places."""
        of = f"of {self.read:,} conversations"
        found = [
            *((f"skipped {n:,} {of}, {reason}", self.skipped, reason) for reason, n in self.skipped.counts.items()),
            *((f"shortened {n:,} {of}, {kind}", self.truncated, kind) for kind, n in self.truncated.counts.items()),
        ]
        for name, n in self.unfilled.counts.items():
            what = "other placeholders" if name == OTHERS else f"{{{{{name}}}}}"
            fix = "more of --fill" if name == OTHERS else f"--fill {name}=..."
            found.append((f"{n:,} {of} hold {what} as it stands, {fix} fills it", self.unfilled, name))
        for kind, n in self.empty_answers.counts.items():
            found.append((f"{n:,} of {self.answers:,} answers are empty", self.empty_answers, kind))
        for kind, n in self.duplicates.counts.items():
            found.append((f"{n:,} samples are exact copies of earlier ones", self.duplicates, kind))
        return [
            f"{self.name}: {line}: {tally.first(kind)}" if places else f"{self.name}: {line}"
            for line, tally, kind in found
        ]


def _digest(encoded: Encoded) -> bytes:
    """Of the ids and their weights, however they are parted into spans."""
    digest = blake2b(array("i", encoded.input_ids), digest_size=16)
    for weight, spans in groupby(encoded.spans, key=lambda span: span[2]):
        digest.update(struct.pack("<qd", sum(span[0] for span in spans), weight))
    return digest.digest()


def _all_places(tally: ReasonCounts) -> list[str]:
    return [place for places in tally.places.values() for place in places]
