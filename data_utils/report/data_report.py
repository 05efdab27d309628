"""The report of a run's data: its sources together, what batches will hold, what is wrong, a few samples to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from data_utils.report.counts import DuplicateIndex
from data_utils.report.padding import padding_shares
from data_utils.report.samples import Sample, visible_line
from data_utils.report.source_report import SourceReport

_SUMMED = (
    *("in_file", "read", "kept", "distinct", "answers", "tokens", "trained_tokens", "trained_weight"),
    *("tokens_by_role", "trained_by_role", "lengths", "trained_lengths"),
    *("skipped", "truncated", "duplicates", "empty_answers", "unfilled"),
)


@dataclass(frozen=True)
class ReportSettings:
    """What of a run's arguments decides about its data.

    Attributes:
        batch_size: samples per device.
        batching: which way of ``padding_shares`` the run goes.
    """

    model: str = ""
    family: str = ""
    label_mask: str = "assistant"
    truncation: str = "turns"
    model_max_length: int = 8192
    batch_size: int = 1
    accumulation: int = 1
    world_size: int = 1
    epochs: float = 1.0
    max_steps: int = -1
    batching: str = "dynamic"

    def flags(self, separator: str) -> str:
        """The flags that decide what is trained, as they would be given."""
        names = ("label_mask", "truncation", "model_max_length")
        return separator.join(f"--{name} {getattr(self, name)}" for name in names)


@dataclass
class DataReport:
    """The account of one set, ``train`` or ``eval``: its sources, and the first samples of it to look at."""

    name: str
    settings: ReportSettings = field(default_factory=ReportSettings)
    most_samples: int = 3
    sources: list[SourceReport] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    seen: DuplicateIndex = field(default_factory=DuplicateIndex, repr=False, compare=False)

    def add_source(self, name: str, format: str = "", in_file: int = 0) -> SourceReport:
        """A report to feed; copies are found across all sources, and across sets that share ``seen``."""
        source = SourceReport(name, format, in_file, seen=self.seen)
        self.sources.append(source)
        return source

    @property
    def wants_samples(self) -> bool:
        return len(self.samples) < self.most_samples

    def add_sample(self, sample: Sample) -> None:
        """Keep a sample to show; those after the first ``most_samples`` are not kept."""
        if self.wants_samples:
            self.samples.append(sample)

    def finish(self) -> None:
        """Nothing more will be counted: free the temporary file."""
        self.seen.close()

    def total(self) -> SourceReport:
        """All sources as one."""
        names = ", ".join(source.name for source in self.sources)
        formats = dict.fromkeys(source.format for source in self.sources)
        total = SourceReport(names, ", ".join(formats))
        total.name = names  # however many they are
        for name in _SUMMED:
            values = [getattr(source, name) for source in self.sources]
            setattr(total, name, reduce(lambda one, other: one + other, values, getattr(total, name)))
        return total

    def padding(self) -> dict[str, float]:
        """The share of padding for each way to make batches, as ``padding_shares``; empty without samples."""
        lengths: Mapping[int, int] = self.total().lengths
        settings = self.settings
        return padding_shares(lengths, settings.model_max_length, settings.batch_size, settings.accumulation)

    @property
    def samples_per_step(self) -> int:
        settings = self.settings
        return settings.batch_size * settings.accumulation * settings.world_size

    def steps(self) -> tuple[int, int]:
        """Optimizer steps of an epoch and of the run; the last step of an epoch may take fewer samples."""
        kept = sum(source.kept for source in self.sources)
        per_epoch = max(1, math.ceil(kept / self.samples_per_step))
        most = self.settings.max_steps
        return per_epoch, most if most > 0 else math.ceil(per_epoch * self.settings.epochs)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the sources together, then each of them."""
        steps: dict[str, Any] = {}
        if self.name == "train":
            steps = dict(zip(("steps_per_epoch", "steps"), self.steps(), strict=True))
        return {
            **self.total().as_dict(),
            **steps,
            "padding": {way: round(share, 6) for way, share in self.padding().items()},
            "settings": {name: _shown(value) for name, value in vars(self.settings).items()},
            "problems": self.problems(),
            "warnings": self.warnings(),
            "sources": [source.as_dict() for source in self.sources],
        }

    def problems(self) -> list[str]:
        """What makes the run worthless, a line each."""
        total = self.total()
        if not total.kept:
            reasons = "; ".join(f"{count:,} skipped, {reason}" for reason, count in total.skipped.counts.items())
            return [f"nothing is left of {total.read:,} conversations{': ' + reasons if reasons else ''}"]
        problems = []
        if not total.trained_tokens:
            problems.append(
                f"nothing is trained: none of {total.tokens:,} tokens counts in the loss. Look at --label_mask "
                f"{visible_line(self.settings.label_mask)}, and at train, loss and weight in the data"
            )
        if total.truncated.total == total.kept:
            problems.append(
                f"every one of {total.kept:,} samples was shortened. Raise --model_max_length "
                f"{self.settings.model_max_length}"
            )
        if total.answers and total.empty_answers.total == total.answers:
            problems.append(f"all {total.answers:,} answers are empty. Look at what the data holds, and where")
        if total.distinct == 1 and total.duplicates.total:
            problems.append(f"all {total.kept:,} samples are the same. Look at what the data holds")
        return problems

    def warnings(self, places: bool = True) -> list[str]:
        """What the user should know, a line each."""
        lines = [line for source in self.sources for line in source.warnings(places)]
        kept = sum(source.kept for source in self.sources)
        if kept:
            lines += [
                f"{source.name}: nothing is left of it" for source in self.sources if source.read and not source.kept
            ]
        if self.name == "train" and 0 < kept < self.samples_per_step:
            lines.append(
                f"a step takes {self.samples_per_step:,} samples, but there are {kept:,}: an epoch is one step"
            )
        return lines


def _shown(value: object) -> object:
    return visible_line(value) if isinstance(value, str) else value
