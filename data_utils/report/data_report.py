"""The report of a data set: its sources, padding, optimizer steps, problems, and a few samples to show."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from chat.turns import TEXT
from data_utils.packing import count_packs
from data_utils.report.counts import DuplicateIndex
from data_utils.report.padding import padding_shares
from data_utils.report.samples import Sample, visible_line
from data_utils.report.source_report import SourceReport

# Of the conversations: a length that keeps so many of them is named if most are too long.
_NEARLY_ALL = 0.95


@dataclass(frozen=True)
class ReportSettings:
    """The arguments of a run that the report shows or needs.

    Attributes:
        batch_size: samples per device and batch.
        batching: the batching strategy of the run, a key of ``padding.STRATEGIES``.
        positions: the most tokens of a sample that the model allows, if that is known.
        packing: training samples are packed; ``None``: if any of them is plain text.
        unpacked: why plain text is not packed either, which it is by default; empty if it is, or if packing was chosen.
        by_source: each source is packed by itself.
        drop_last: items that fill no batch are left out of each epoch.
        thinking, split_turns: see ``data_utils.encode.EncodeOptions``.
        has_switch: the chat format has prompts with thinking and without.
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
    positions: int | None = None
    packing: bool | None = False
    unpacked: str = ""
    by_source: bool = False
    drop_last: bool = False
    thinking: str = "on"
    split_turns: str = "never"
    has_switch: bool = False

    def data_flags(self, separator: str = " ") -> str:
        """Return the flags that decide which tokens are trained, with their values."""
        names = ("label_mask", "truncation", "model_max_length", "thinking", "split_turns")
        return separator.join(f"--{name} {getattr(self, name)}" for name in names)


def count_steps(
    items: int, items_per_step: int, epochs: float, max_steps: int, accumulation: int = 1, drop_last: bool = False
) -> tuple[int, int]:
    """Return the optimizer steps of an epoch and of the run. The last step of an epoch may use fewer items.

    Args:
        items: samples, or packs of them.
        max_steps: replaces ``epochs`` if positive.
        drop_last: leave out the items that fill no batch on all devices, of which a step has ``accumulation``.
    """
    items -= items % (items_per_step // accumulation) if drop_last else 0
    per_epoch = max(1, math.ceil(items / items_per_step))
    return per_epoch, max_steps if max_steps > 0 else math.ceil(per_epoch * epochs)


@dataclass
class DataReport:
    """The report of one set, ``train`` or ``eval``."""

    name: str
    settings: ReportSettings = field(default_factory=ReportSettings)
    max_samples: int = 3
    sources: list[SourceReport] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    duplicate_index: DuplicateIndex = field(default_factory=DuplicateIndex, repr=False, compare=False)

    def add_source(self, name: str, format: str = "", in_file: int = 0) -> SourceReport:
        """Add an empty report of a source. Duplicates are found across all sources that share an index."""
        source = SourceReport(name, format, in_file, duplicate_index=self.duplicate_index)
        self.sources.append(source)
        return source

    @property
    def accepts_samples(self) -> bool:
        """Whether one more is kept: there are fewer than ``max_samples``, or two are of one record."""
        return len({sample.where for sample in self.samples}) < self.max_samples

    def accepts(self, where: str) -> bool:
        """Return whether a sample of a record is to be shown."""
        is_new = all(sample.where != where for sample in self.samples)
        return self.accepts_samples and (is_new or len(self.samples) < self.max_samples)

    def add_sample(self, sample: Sample) -> None:
        """Keep a sample to show, if it is accepted; the last that is not its record's first makes room for it."""
        if not self.accepts(sample.where):
            return
        if len(self.samples) == self.max_samples:
            places = [each.where for each in self.samples]
            del self.samples[max(index for index, where in enumerate(places) if where in places[:index])]
        self.samples.append(sample)

    def close(self) -> None:
        """Delete the temporary file of the duplicate index. Nothing can be counted afterwards."""
        self.duplicate_index.close()

    def total(self) -> SourceReport:
        """Return the sum of all sources."""
        total = SourceReport("", ", ".join(dict.fromkeys(source.format for source in self.sources)))
        total.name = ", ".join(source.name for source in self.sources)  # set here so that it is not shortened
        for source in self.sources:
            total += source
        return total

    def padding(self) -> dict[str, float]:
        """Return the share of padding of each batching strategy, see ``padding_shares``; empty without samples."""
        settings = self.settings
        lengths = self.total().lengths
        return padding_shares(lengths, settings.model_max_length, settings.batch_size, settings.accumulation)

    @property
    def is_packed(self) -> bool:
        """Whether the samples are packed; those of an evaluation never are."""
        packing = self.settings.packing
        return self.name == "train" and (self._has_text if packing is None else packing)

    @property
    def _has_text(self) -> bool:
        return any(source.tokens_by_role[TEXT] for source in self.sources)

    def packs(self) -> int:
        """Return the number of packs; 0 if samples are not packed."""
        if not self.is_packed:
            return 0
        parts = [source.lengths for source in self.sources] if self.settings.by_source else [self.total().lengths]
        return sum(count_packs(lengths, self.settings.model_max_length) for lengths in parts)

    def packing(self) -> dict[str, Any] | None:
        """Return the number of packs, their capacity in tokens and the share of it that samples fill, for JSON."""
        if not (packs := self.packs()):
            return None
        capacity = self.settings.model_max_length
        return {"packs": packs, "capacity": capacity, "fill": round(self.total().tokens / (packs * capacity), 6)}

    def describe_packing(self) -> str:
        """Describe the packs in one sentence, or why there are none by default; empty if packing was turned off."""
        if not (packing := self.packing()):
            if self.name != "train" or not self.total().kept:
                return ""
            if self.settings.packing is None:
                return "Off: --packing auto packs training data that contains plain text"
            return (
                f"Off, though there is plain text: {self.settings.unpacked}"
                if self.settings.unpacked and self._has_text
                else ""
            )
        return (
            f"{self.total().samples:,} samples in {packing['packs']:,} packs of up to "
            f"{packing['capacity']:,} tokens, {packing['fill']:.1%} filled"
        )

    def describe_answers(self) -> list[str]:
        """Return sentences on the answers that are trained, and on conversations with a sample for each of them."""
        total, settings = self.total(), self.settings
        if not total.answers_trained:
            return []
        text = f"{total.answers_trained:,} of {total.answers:,} answers are trained"
        if total.answers_with_thinking or settings.has_switch:
            text += f", {total.answers_with_thinking:,} of them with thinking"
        if settings.has_switch and settings.thinking in ("auto", "mixed"):
            text += f", each behind the prompt that fits it (--thinking {settings.thinking})"
        lines = [f"{text}."]
        if left := total.answers - total.answers_trained:
            mask = f"--label_mask {settings.label_mask} leaves them out, " if settings.label_mask == "last" else ""
            lines.append(f"{left:,} are not: {mask}no prompt leads to them where they stand, or they are too long.")
        if total.split:
            share = total.repeated_tokens / (total.tokens - total.repeated_tokens)
            lines.append(
                f"{total.split:,} of {total.kept:,} {total.noun} are split into {total.split_samples:,} samples, one "
                f"for each answer (--split_turns {settings.split_turns}): {total.repeated_tokens:,} tokens more, "
                f"{share:.1%}."
            )
        return lines

    @property
    def items_per_step(self) -> int:
        """Samples, or packs of them, of an optimizer step."""
        settings = self.settings
        return settings.batch_size * settings.accumulation * settings.world_size

    def _count_items(self) -> int:
        return self.packs() or self.total().samples

    def steps(self) -> tuple[int, int]:
        """Return the optimizer steps of an epoch and of the run."""
        settings = self.settings
        schedule = (settings.epochs, settings.max_steps, settings.accumulation, settings.drop_last)
        return count_steps(self._count_items(), self.items_per_step, *schedule)

    def describe_steps(self) -> str:
        """Describe the number of optimizer steps and the items of each in two sentences."""
        settings = self.settings
        per_epoch, steps = self.steps()
        epochs = "1 epoch" if settings.epochs == 1 else f"{settings.epochs:g} epochs"
        reason = f"--max_steps {settings.max_steps}" if settings.max_steps > 0 else epochs
        devices = "1 device" if settings.world_size == 1 else f"{settings.world_size:,} devices"
        return (
            f"{steps:,} in total ({reason}), {per_epoch:,} per epoch. "
            f"A step uses {self.items_per_step:,} {self._items}: "
            f"{settings.batch_size} per device x {settings.accumulation} accumulation steps x {devices}."
        )

    @property
    def _items(self) -> str:
        return f"packs of up to {self.settings.model_max_length:,} tokens" if self.is_packed else "samples"

    def _step_flags(self) -> str:
        """Return the flags that decide how many samples a step uses, with their values."""
        settings = self.settings
        flags = {
            "per_device_train_batch_size": settings.batch_size,
            "gradient_accumulation_steps": settings.accumulation,
        }
        return " or ".join(f"--{name} {value}" for name, value in flags.items() if value > 1) or "the number of devices"

    def as_dict(self) -> dict[str, Any]:
        """Return the sum of the sources, then each source, for JSON."""
        steps: dict[str, Any] = {}
        if self.name == "train":
            steps = dict(zip(("steps_per_epoch", "steps"), self.steps(), strict=True))
        settings = vars(self.settings)
        return {
            **self.total().as_dict(),
            **steps,
            "packing": self.packing(),
            "padding": {strategy: round(share, 6) for strategy, share in self.padding().items()},
            "settings": {
                key: visible_line(value) if isinstance(value, str) else value for key, value in settings.items()
            },
            "problems": self.problems(),
            "warnings": self.warnings(),
            "sources": [source.as_dict() for source in self.sources],
        }

    def problems(self) -> list[str]:
        """Return a line for each finding that makes the run worthless."""
        total = self.total()
        if total.in_file and not total.read:
            return [f"none of {total.in_file:,} records is left: --eval_split holds out, or #N and @xF leave out, all"]
        if not total.kept:
            reasons = "; ".join(f"{count:,} skipped, {reason}" for reason, count in total.skipped.counts.items())
            what = f"none of {total.read:,} {total.noun} can be used{': ' + reasons if reasons else ''}"
            return [f"{what}. {advice}" if (advice := self.fitting_length()) else what]
        problems = []
        if not total.trained_tokens:
            problems.append(
                f"no token is trained: none of {total.tokens:,} tokens counts in the loss. Check --label_mask "
                f"{visible_line(self.settings.label_mask)}, and the fields train, loss and weight of the turns"
            )
        if total.truncated.total == total.kept:
            advice = self.fitting_length() or f"Raise --model_max_length {self.settings.model_max_length}"
            problems.append(f"all {total.kept:,} {total.noun} were shortened. {advice}")
        if total.answers and total.empty_answers.total == total.answers:
            problems.append(f"all {total.answers:,} answers are empty. Check which field of the data has the answers")
        if total.distinct == 1 and total.duplicates.total:
            problems.append(f"all {total.samples:,} samples are identical. Check the data")
        return problems

    def warnings(self, with_locations: bool = True) -> list[str]:
        """Return a line for each finding that the user should know."""
        lines = [
            *self._lost_tokens(),
            *self._lost_thinking(),
            *(line for source in self.sources for line in source.warnings(with_locations)),
        ]
        kept = sum(source.kept for source in self.sources)
        if kept:
            unused = (source for source in self.sources if source.read and not source.kept)
            lines += [f"{source.name}: none of its {source.noun} can be used" for source in unused]
            lines += [
                f"{source.name}: none of its {source.in_file:,} records is used for this set"
                for source in self.sources
                if source.in_file and not source.read
            ]
        if self.name == "train" and 0 < (count := self._count_items()) < self.items_per_step:
            only = f"there {'is' if count == 1 else 'are'} only {count:,}"
            lines.append(
                f"a step uses {self.items_per_step:,} {self._items}, but {only}: an epoch is one step. Lower "
                f"{self._step_flags()} for more steps"
            )
        if self.name == "train" and self.settings.drop_last:
            count, batch = self._count_items(), self.settings.batch_size * self.settings.world_size
            if dropped := count % batch:
                lines.append(
                    f"--dataloader_drop_last leaves out {dropped:,} of {count:,} {self._items} in each epoch, which do "
                    f"not fill a batch of {batch:,}"
                )
        return lines

    def fitting_length(self) -> str:
        """Return a sentence on the ``--model_max_length`` that keeps all conversations; empty if none is too long.

        If most are, it also has the one that keeps nearly all.
        """
        total, settings = self.total(), self.settings
        longest, most = total.length_that_keeps(1), total.length_that_keeps(_NEARLY_ALL)
        if not longest:
            return ""
        enough = min(longest, settings.positions or longest)
        if enough <= settings.model_max_length:
            return f"The longest has {longest} tokens, and the model allows {settings.positions}"
        keeps = "keeps all of them" if enough == longest else "is the most that the model allows"
        advice = f"--model_max_length {enough} {keeps}"
        return f"{advice}, {most} keeps {_NEARLY_ALL:.0%}" if total.length_that_keeps(0.5) and most < enough else advice

    def _lost_thinking(self) -> list[str]:
        """Return a line if a model that can think would learn answers without it only."""
        total, settings = self.total(), self.settings
        if self.name != "train" or settings.thinking != "auto" or not settings.has_switch:
            return []
        if not total.answers_trained or total.answers_with_thinking:
            return []
        return [
            "no answer brings thinking, so only answers behind the prompt without it are trained, and those with "
            "thinking may get worse. Ask the result without it (--thinking off of scripts.ask), or add answers with "
            "reasoning_content; --thinking mixed does not warn"
        ]

    def _lost_tokens(self) -> list[str]:
        """Return a line about what ``--model_max_length`` costs, and the length that keeps more; none if all fits."""
        total = self.total()
        if not total.too_long:
            return []
        return [
            f"{total.too_long:,} of {total.read:,} {total.noun} are longer than --model_max_length "
            f"{self.settings.model_max_length}: {total.lost_tokens / (total.tokens + total.lost_tokens):.1%} of all "
            f"tokens are left out. {self.fitting_length()}"
        ]
