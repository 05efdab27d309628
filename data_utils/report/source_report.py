"""The counts of one data source: records read, kept and skipped, and tokens trained.

Conversations are added one at a time. Memory does not grow with the data: there are only counts, the first locations of
each reason, and the number of samples of each length.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from operator import iadd
from typing import TYPE_CHECKING, Any

from chat.turns import Turn
from data_utils.report.counts import COPY_OF, OTHER_REASONS, DuplicateIndex, ReasonCounts, counted
from data_utils.report.samples import Encoded, visible_line

if TYPE_CHECKING:
    from data_utils.encode import EncodedConversation

_TOO_LONG = "too long"
_PERCENTILES = (5, 25, 50, 75, 95, 99)
_REASONS = ("skipped", "truncated", "duplicates", "empty_answers", "unfilled", "notes")
_SUMMED = (
    *("in_file", "read", "kept", "distinct", "answers", "answers_trained", "answers_with_thinking"),
    *("split", "split_samples", "repeated_tokens", "tokens", "trained_tokens", "trained_weight"),
    *("tokens_by_role", "trained_by_role", "lengths", "trained_lengths", "full_lengths", "lost_tokens"),
    *_REASONS,
)


@dataclass
class SourceReport:
    """The counts of one source. ``read == kept + skipped.total``, always.

    Attributes:
        name: as given on the command line: ``a.json#500@x2``.
        format: conversations, messages, alpaca, pairs or text.
        in_file: records in its files.
        read: conversations or texts taken from it. One that is repeated three times counts as three, here and in all
            counts below except ``distinct`` and ``duplicates``.
        skipped: by reason.
        truncated: kept conversations that were shortened, by reason.
        duplicates: exact copies of an earlier sample of any source; requested repeats do not count.
        distinct: samples that are no such copies.
        answers: assistant turns that may be trained; ``empty_answers`` of them have neither text nor calls.
        answers_trained: those of them that are; ``answers_with_thinking`` of these bring thinking.
        split: conversations with a sample for each answer; ``split_samples`` of them all. ``repeated_tokens`` are those
            of all samples but the longest of each conversation: what splitting adds.
        unfilled: samples that contain a placeholder without a value, by the placeholder's name.
        notes: samples with a loss or a doubt, by ``data_utils.schema.Notes``.
        tokens: all ids; ``tokens_by_role`` splits them by the role of the turn.
        trained_tokens: ids with weight > 0 that are not the first of a sample; ``trained_weight`` is the sum of their
            weights.
        lengths: number of samples of each length; ``trained_lengths``: of each number of trained tokens. A text that
            is cut has several samples, and so has a conversation with one for each answer.
        full_lengths: number of conversations of each length beyond the maximum, which are shortened or skipped;
            ``lost_tokens``: the ids that this costs.
    """

    name: str
    format: str = ""
    in_file: int = 0
    read: int = 0
    kept: int = 0
    distinct: int = 0
    answers: int = 0
    answers_trained: int = 0
    answers_with_thinking: int = 0
    split: int = 0
    split_samples: int = 0
    repeated_tokens: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    trained_weight: float = 0.0
    tokens_by_role: Counter[str] = field(default_factory=Counter)
    trained_by_role: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    trained_lengths: Counter[int] = field(default_factory=Counter)
    full_lengths: Counter[int] = field(default_factory=Counter)
    lost_tokens: int = 0
    skipped: ReasonCounts = field(default_factory=ReasonCounts)
    truncated: ReasonCounts = field(default_factory=ReasonCounts)
    duplicates: ReasonCounts = field(default_factory=ReasonCounts)
    empty_answers: ReasonCounts = field(default_factory=ReasonCounts)
    unfilled: ReasonCounts = field(default_factory=ReasonCounts)
    notes: ReasonCounts = field(default_factory=ReasonCounts)
    duplicate_index: DuplicateIndex | None = field(default_factory=DuplicateIndex, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.name = visible_line(self.name)

    @classmethod
    def part(cls) -> SourceReport:
        """Return empty counts to be added to those of a source. They do not tell copies from distinct samples."""
        part = cls("", duplicate_index=None)
        for name in _REASONS:
            getattr(part, name).most = math.inf  # there are limits when they are added
        return part

    def __iadd__(self, other: SourceReport) -> SourceReport:
        """Add the counts of what follows, of this source or of another."""
        for name in _SUMMED:
            setattr(self, name, iadd(getattr(self, name), getattr(other, name)))
        return self

    @property
    def samples(self) -> int:
        """Number of samples: of a conversation one, or one for each answer; of a plain text one for each piece."""
        return self.lengths.total()

    @property
    def too_long(self) -> int:
        """Number of conversations with more than the maximum number of ids."""
        return self.full_lengths.total()

    def length_that_keeps(self, share: float) -> int:
        """Return the least number of ids that, as the maximum, would keep a share of the conversations whole.

        It is 0 if the present maximum does. Conversations that are skipped for other reasons do not count.
        """
        whole = self.kept - self.truncated.total
        missing = math.ceil(share * (whole + self.too_long)) - whole
        for length, count in sorted(self.full_lengths.items()):
            if missing <= 0:
                break
            missing -= count
            if missing <= 0:
                return length
        return 0

    @property
    def noun(self) -> str:
        """What its records are."""
        formats = set(self.format.split(", "))
        return "conversations" if "text" not in formats else "texts" if formats == {"text"} else "records"

    def skip(self, where: object, reason: str, copies: int = 1) -> None:
        """Count a conversation that is left out."""
        self.read += copies
        self.skipped.add(reason, where, copies)

    def count_too_long(self, full_length: int, kept_length: int, copies: int = 1) -> None:
        """Count a conversation that is too long, beside ``skip`` or ``keep``: its ids, and how many remain."""
        self.full_lengths[full_length] += copies
        self.lost_tokens += (full_length - kept_length) * copies

    def keep(
        self,
        where: object,
        encoded: Encoded,
        unfilled: Iterable[str] = (),
        copies: int = 1,
        *,
        answers: tuple[int, int] = (0, 0),
        truncated: str | None = None,
        notes: Iterable[str] = (),
        is_first: bool = True,
    ) -> None:
        """Count a sample. Call this once for each record, and for each further sample of it.

        Args:
            unfilled: names of placeholders in it that have no value.
            copies: how many times the sample is used.
            answers: see ``count_answers``.
            notes: sentences that follow "conversations ...".
            truncated: how it was shortened; by default ``encoded.turns_dropped`` decides whether it was.
            is_first: not a further sample of the record that was counted before.
        """
        length = len(encoded.input_ids)
        assert copies > 0 and length == sum([span[0] for span in encoded.spans]), "the spans do not cover the ids"
        self.read += copies if is_first else 0
        self.kept += copies if is_first else 0
        self.tokens += length * copies
        self.lengths[length] += copies
        self._count_spans(encoded.spans, copies)
        if is_first and (truncated is not None or encoded.turns_dropped):
            self.truncated.add(truncated or _TOO_LONG, where, copies)
        for name in unfilled:
            self.unfilled.add(name, where, copies)
        for note in notes:
            self.notes.add(note, where, copies)
        self.answers += answers[0] * copies
        if answers[1]:
            self.empty_answers.add("empty answer", where, answers[1] * copies)
        if self.duplicate_index is not None:
            [original] = self.duplicate_index.add([digest_of(encoded.input_ids, encoded.spans)], [visible_line(where)])
            self.count_copy(where, original)

    def count_samples(self, samples: Sequence[EncodedConversation], copies: int = 1) -> None:
        """Count the trained answers of a conversation, and what splitting it adds, beside ``keep``."""
        for sample in samples:
            self.answers_trained += sample.answers * copies
            self.answers_with_thinking += sample.with_thinking * copies
        if len(samples) > 1:
            lengths = [len(sample.input_ids) for sample in samples]
            self.split += copies
            self.split_samples += len(samples) * copies
            self.repeated_tokens += (sum(lengths) - max(lengths)) * copies

    def count_copy(self, where: object, original: str | None) -> None:
        """Count a sample as a copy of an earlier one, or as distinct if there is none."""
        if original is None:
            self.distinct += 1
        else:
            self.duplicates.add("exact copy", f"{where}{COPY_OF}{original}")

    def _count_spans(self, spans: Sequence[tuple[int, str, float]], copies: int) -> None:
        start = trained_tokens = 0
        for length, role, weight in spans:
            self.tokens_by_role[role] += length * copies
            # The first token of a sample is never predicted.
            trained = length - (start == 0 and length > 0) if weight > 0 else 0
            if trained:
                self.trained_by_role[role] += trained * copies
                self.trained_weight += trained * weight * copies
                trained_tokens += trained
            start += length
        self.trained_tokens += trained_tokens * copies
        self.trained_lengths[trained_tokens] += copies

    def length_summary(self) -> dict[str, float]:
        """Return ``min``, ``5%`` ... ``99%``, ``max`` and ``mean`` of the samples' lengths; empty without samples.

        A percentile is the smallest length that at least this share of the samples does not exceed.
        """
        if not self.kept:
            return {}
        ordered = sorted(self.lengths.items())
        summary: dict[str, float] = {"min": ordered[0][0]}
        percentiles, cumulated = list(_PERCENTILES), 0
        for length, count in ordered:
            cumulated += count
            while percentiles and cumulated * 100 >= percentiles[0] * self.samples:
                summary[f"{percentiles.pop(0)}%"] = length
        return summary | {"max": ordered[-1][0], "mean": round(self.tokens / self.samples, 1)}

    def as_dict(self) -> dict[str, Any]:
        """Return the counts and the first 100 locations of each reason, for JSON."""
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
            "answers_trained": self.answers_trained,
            "answers_with_thinking": self.answers_with_thinking,
            "split": self.split,
            "split_samples": self.split_samples,
            "repeated_tokens": self.repeated_tokens,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "trained_weight": round(self.trained_weight, 6),
            "tokens_by_role": dict(sorted(self.tokens_by_role.items())),
            "trained_by_role": dict(sorted(self.trained_by_role.items())),
            "samples": self.samples,
            "lengths": self.length_summary(),
            "skipped_by_reason": dict(self.skipped.counts),
            "truncated_by_kind": dict(self.truncated.counts),
            "unfilled": dict(self.unfilled.counts),
            "notes": dict(self.notes.counts),
            "skipped_at": _locations_with_reasons(self.skipped),
            "truncated_at": _all_locations(self.truncated),
            "duplicates_at": _all_locations(self.duplicates),
            "empty_answers_at": _all_locations(self.empty_answers),
            "unfilled_at": _all_locations(self.unfilled),
            "notes_at": _locations_with_reasons(self.notes),
        }

    def warnings(self, with_locations: bool = True) -> list[str]:
        """Return a line for each kind of finding: how many conversations, the reason, the first locations."""
        of = f"of {self.read:,} {self.noun}"
        findings = [
            *((f"skipped {n:,} {of}, {reason}", self.skipped, reason) for reason, n in self.skipped.counts.items()),
            *(
                (f"shortened {n:,} {of}, {reason}", self.truncated, reason)
                for reason, n in self.truncated.counts.items()
            ),
        ]
        for note, n in self.notes.counts.items():
            line = f"{n:,} {of} {note}" if note != OTHER_REASONS else f"{n:,} other notes on conversations"
            findings.append((line, self.notes, note))
        for name, n in self.unfilled.counts.items():
            if name == OTHER_REASONS:
                line = f"{n:,} {of} contain other placeholders, which more --fill arguments fill"
            else:
                line = f"{n:,} {of} contain the placeholder {{{{{name}}}}}, which --fill {name}=... fills"
            findings.append((line, self.unfilled, name))
        for reason, n in self.empty_answers.counts.items():
            findings.append((f"{n:,} of {self.answers:,} answers are empty", self.empty_answers, reason))
        for reason, n in self.duplicates.counts.items():
            copies = "is an exact copy of an earlier one" if n == 1 else "are exact copies of earlier ones"
            findings.append((f"{counted(n, 'samples')} {copies}", self.duplicates, reason))
        return [
            f"{self.name}: {line}: {counts.first_locations(reason)}" if with_locations else f"{self.name}: {line}"
            for line, counts, reason in findings
        ]


def count_answers(turns: Iterable[Turn]) -> tuple[int, int]:
    """Return the number of answers that may be trained, and how many of them have neither text nor calls."""
    answers = [turn for turn in turns if turn.role == "assistant" and turn.weight != 0]
    return len(answers), len([turn for turn in answers if not turn.calls and not turn.content.strip()])


def digest_of(ids: Sequence[int], spans: Iterable[tuple[int, str, float]]) -> bytes:
    """Hash the ids and their weights, independently of how spans divide them."""
    runs = array("d")
    for length, _, weight in spans:
        if runs and runs[-1] == weight:
            runs[-2] += length
        else:
            runs.extend((length, weight))
    digest = blake2b(ids if isinstance(ids, array) else array("i", ids), digest_size=16)
    digest.update(runs)
    return digest.digest()


def _locations_with_reasons(counts: ReasonCounts) -> list[dict[str, str]]:
    return [
        {"where": location, "reason": reason}
        for reason, locations in counts.locations.items()
        for location in locations
    ]


def _all_locations(counts: ReasonCounts) -> list[str]:
    return [location for locations in counts.locations.values() for location in locations]
