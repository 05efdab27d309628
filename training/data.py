"""The data of a run: its examples, or only the reports on them."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

from transformers import TrainingArguments

from checkpoints.files import save_json, save_text
from checkpoints.names import DATA_REPORT, DATA_REPORT_PAGE
from checkpoints.rope import with_yarn
from console import DISK_FULL, wants_color
from data_utils.blocks import KeptConversation
from data_utils.collate import Collator
from data_utils.dataset import DataOptions, DataReader, report_settings
from data_utils.encode import EncodeOptions, Encoder
from data_utils.examples import ExampleSet
from data_utils.prepared import Prepared, prepare_temporary
from data_utils.report.counts import counted
from data_utils.report.data_report import DataReport
from data_utils.report.page import render_html
from data_utils.report.terminal import render_report
from data_utils.sources import parse_fill, parse_source
from loading.checkpoint import Checkpoint
from loading.config_files import load_model_config, max_positions
from loading.prompt_modes import prompt_families
from processes import count_processes, is_first
from training.base import load_base
from training.cache_entries import usable_folder
from training.config.args import RunArguments
from training.data_cache import find_or_prepare
from training.display import draws_bars
from training.distributed.agreement import check_same_data
from training.distributed.shared_data import load_shared
from training.distributed.world import World
from training.rows import choose_packing, why_padded, why_unpacked
from training.samplers import PackedExamples
from training.training_arguments import check_training_arguments

logger = logging.getLogger(__name__)

# Flags that concern conversations; --fill says itself what it does not find.
_OF_CONVERSATIONS = (
    "system_message", "label_mask", "truncation", "thinking", "split_turns", "preserve_thinking", "reasoning_effort",
)  # fmt: skip


def load_shared_data(
    world: World, args: RunArguments, training_arguments: TrainingArguments, checkpoint: Checkpoint
) -> dict[str, ExampleSet]:
    """Load the data once per host, and check that all hosts have the same.

    Raises:
        ConfigError: a file or a record that cannot be used, or hosts with different data; on all ranks.
    """
    sets = load_shared(world, lambda: prepare_data(args, training_arguments, checkpoint))
    check_same_data(world, sets)
    return sets


def load_data(
    args: RunArguments, training_arguments: TrainingArguments, checkpoint: Checkpoint
) -> dict[str, ExampleSet]:
    """Return the ``train`` set and, if there is evaluation data, the ``eval`` set; see ``prepare_data``."""
    prepared = prepare_data(args, training_arguments, checkpoint)
    prepared.release()
    return prepared.sets


def prepare_data(args: RunArguments, training_arguments: TrainingArguments, checkpoint: Checkpoint) -> Prepared:
    """Open the data of a run in the cache of prepared data, or prepare it.

    Raises:
        DataError: a file or a record that cannot be used.
    """
    if args.data.lazy_preprocess:
        logger.info("--lazy_preprocess has no effect: conversations are checked and tokenised before the first step")
    cache = None if args.data.no_data_cache else usable_folder(args.data)
    prepared: Prepared | None = None
    if cache is not None:
        try:
            prepared = find_or_prepare(cache, build_reader(args, training_arguments, checkpoint), checkpoint)
        except OSError as error:
            if args.data.data_cache_dir is not None or error.errno not in DISK_FULL:
                raise
            logger.warning("Prepared data is not kept: %s", error)  # nobody has asked for this folder
    if prepared is None:
        prepared = prepare_temporary(build_reader(args, training_arguments, checkpoint))
    sets = prepared.sets
    _log_unused_flags(args, [examples.report for examples in sets.values()])
    if "eval" in sets and training_arguments.eval_strategy == "no" and not training_arguments.eval_on_start:
        logger.warning(
            "Evaluation data: %s, but the run never evaluates. Give --eval_strategy",
            counted(len(sets["eval"]), "samples"),
        )
    return prepared


def preview_data(
    args: RunArguments, max_samples: int = 3, use: Callable[[DataReader, KeptConversation], object] | None = None
) -> dict[str, DataReport]:
    """Read the data and return the report of each set. Keeps no examples, and starts no processes.

    Args:
        max_samples: samples of each set that its report shows.
        use: called with every conversation that would be trained or evaluated.

    Raises:
        ConfigError: a checkpoint without a usable tokenizer.
        DataError: a file or a record that cannot be used.
    """
    checkpoint = load_base(args)
    reader = build_reader(args, args.trainer_values(), checkpoint, max_samples)
    for kept in reader.read():
        if use is not None:
            use(reader, kept)
    _log_unused_flags(args, reader.reports.values())
    return reader.reports


def _log_unused_flags(args: RunArguments, reports: Iterable[DataReport]) -> None:
    """Log the flags that were given and have no effect on the data, because it is plain text."""
    flags = [item for item in fields(args.data) if item.name in _OF_CONVERSATIONS]
    given = [f"--{item.name} {value}" for item in flags if (value := getattr(args.data, item.name)) != item.default]
    if given and all(report.total().noun == "texts" for report in reports):
        logger.warning("All data is plain text, on which these flags have no effect: %s", ", ".join(given))


def show_preview(args: RunArguments) -> int:
    """Print the data reports of ``--dry_run`` on rank 0, and return the exit code: see ``show_reports``.

    Raises:
        ConfigError: arguments that transformers refuses, or an unusable checkpoint.
        DataError: see ``preview_data``.
    """
    if not is_first():
        return 0
    check_training_arguments(args)
    return show_reports(preview_data(args))


def build_reader(
    args: RunArguments, flags: TrainingArguments | SimpleNamespace, checkpoint: Checkpoint, max_samples: int = 3
) -> DataReader:
    """Return a reader of ``--data_path`` and ``--eval_data_path``.

    Args:
        flags: transformers' flags: the ``TrainingArguments`` of a run, or ``args.trainer_values()`` without a run.
        max_samples: samples of each set that its report shows.
    """
    data = args.data
    encode_options = EncodeOptions(
        max_length=data.model_max_length,
        system_message=data.system_message,
        label_mask=data.label_mask,
        truncation=data.truncation,
        needs_answer=data.label_mask != "all",
        allow_special_tokens=tuple(dict.fromkeys(data.allow_special_tokens or ())),
        thinking=data.thinking,
        split_turns=data.split_turns,
    )
    data_options = DataOptions(
        data_format=data.data_format,
        fill=parse_fill(data.fill or ()),
        skip_bad=data.on_bad_record == "skip",
        eval_share=data.eval_split,
        seed=flags.seed if flags.data_seed is None else flags.data_seed,
    )
    family, plain = prompt_families(checkpoint, data.thinking, data.template_arguments)
    encoder = Encoder(checkpoint.tokenizer, family, encode_options, plain)
    encoder.check_rows(checkpoint.config.vocab_size)
    config = checkpoint.config.to_dict()
    settings = report_settings(
        encoder,
        model=checkpoint.name,
        positions=max_positions(with_yarn(load_model_config(checkpoint.folder), checkpoint.yarn)),
        batch_size=flags.per_device_train_batch_size,
        accumulation=flags.gradient_accumulation_steps,
        world_size=count_processes(),
        epochs=flags.num_train_epochs,
        max_steps=flags.max_steps,
        packing=choose_packing(args, config),
        unpacked=why_unpacked(args, config) if data.packing == "auto" else "",
        by_source=data.data_mixing == "sequential",
        drop_last=flags.dataloader_drop_last,
        batching=_batching(args, checkpoint, flags.train_sampling_strategy == "group_by_length"),
    )
    flags_of_sets = {"train": ("--data_path", data.data_path), "eval": ("--eval_data_path", data.eval_data_path)}
    return DataReader(
        {name: [parse_source(path, flag) for path in paths] for name, (flag, paths) in flags_of_sets.items() if paths},
        encoder,
        data_options,
        settings,
        max_samples=max_samples,
        show_progress=draws_bars(flags.disable_tqdm) and is_first(),
        processes=data.dataset_num_proc,
    )


def _batching(args: RunArguments, checkpoint: Checkpoint, is_grouped: bool) -> str:
    if not why_padded(args, checkpoint.config.to_dict()):
        return "rows"
    return "grouped" if is_grouped else "dynamic"


def packs_samples(args: RunArguments, checkpoint: Checkpoint, examples: ExampleSet) -> bool:
    """Return whether the training examples are packed."""
    packing = choose_packing(args, checkpoint.config.to_dict())
    return examples.has_text if packing is None else packing


def build_train_dataset(
    args: RunArguments, checkpoint: Checkpoint, examples: ExampleSet
) -> ExampleSet | PackedExamples:
    """Return the training examples, packed as ``--packing`` says."""
    if not packs_samples(args, checkpoint, examples):
        return examples
    return PackedExamples(examples, args.data.model_max_length, by_source=args.data.data_mixing == "sequential")


def build_collator(args: RunArguments, checkpoint: Checkpoint) -> Collator:
    """Return the collator of a run. It pads with end-of-text; padding is masked by length, so the id has no effect."""
    reason = why_padded(args, checkpoint.config.to_dict())
    if reason and args.data.padding_free:
        logger.info("Batches are padded: %s", reason)
    return Collator(checkpoint.end_ids[-1], is_padded=bool(reason))


def show_reports(reports: Mapping[str, DataReport]) -> int:
    """Print the reports; return 1 if a report contains a problem that would make the run worthless, else 0."""
    width = shutil.get_terminal_size((100, 24)).columns
    for report in reports.values():
        print(render_report(report, color=wants_color(sys.stdout), width=width))
    return 1 if any(report.problems() for report in reports.values()) else 0


def save_reports(reports: Mapping[str, DataReport], folder: Path) -> None:
    """Write ``data_receipt.json`` and ``data_receipt.html``, which also shows samples."""
    folder.mkdir(parents=True, exist_ok=True)
    write_reports(reports, folder / DATA_REPORT, folder / DATA_REPORT_PAGE)


def write_reports(reports: Mapping[str, DataReport], json_file: Path | None, html_file: Path | None) -> None:
    """Write the reports as JSON, as an HTML page, or both."""
    if json_file is not None:
        save_json({name: report.as_dict() for name, report in reports.items()}, json_file)
    if html_file is not None:
        save_text(render_html(list(reports.values())), html_file)
