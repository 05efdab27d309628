"""Compare models on held-out questions: ``python -m scripts.evaluate --model_name_or_path BASE --adapter A
--data_path held_out.jsonl --output DIR``; or on known benchmarks (``--tasks``), by their calls of functions
(``--tool_use``), by the perplexity of a text (``--perplexity``).

Each model answers the last turn of each sample greedily, and its loss on all answers is measured; so are forty
general questions, which show what tuning has made it forget. Differences from the base come with 95 % intervals.

The folder has report.json, report.html and answers.jsonl, from which the same command continues a run that was killed.
The exit code is 1 if a bound such as --min_exact_match is not reached by the adapter, or the model of --against, or
the only model.

--perplexity measures windows of several lengths (--lengths), also beyond those that a model was trained on: with and
without dynamic NTK, log-n attention, YaRN (--variants). It writes perplexity.json, perplexity.html and windows.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands import CommandParser, importing, is_out_of_memory, run_command, set_up_logging
from console import show
from data_utils.files import data_files
from data_utils.sources import parse_source
from errors import ConfigError, DataError, RunError, one_line
from evaluation.metrics import SCORES
from evaluation.prompt_flags import PROMPT_FLAGS, Prompts, add_prompt_flags
from evaluation.task_flags import TASK_FLAGS, add_task_flags, check_harness, check_task_flags, read_items
from evaluation.variants import UNPUBLISHED, VARIANTS
from outputs import check_shared_folder, parse_output
from training.config.args import ModelArguments
from training.rope_checks import rope_flag_faults

if TYPE_CHECKING:
    from evaluation.evaluating import Opened, Sets, Subject
    from evaluation.perplexity import Reading, Windows

logger = logging.getLogger(__name__)

_MOST_TOKENS = 1 << 20
LENGTHS = (1024, 2048, 4096, 8192)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m scripts.evaluate", description=(__doc__ or "").partition("\n\n")[2], allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", required=True, help="base: checkpoint folder, or model id on a hub")
    parser.add_argument("--adapter", metavar="DIR", help="LoRA adapter of the base")
    parser.add_argument(
        "--against", action="append", default=[], metavar="DIR",
        help="another checkpoint (merged, quantised) or adapter; can be given repeatedly",
    )  # fmt: skip
    parser.add_argument("--any_base", action="store_true", help="accept adapters that were trained on other weights")
    add_prompt_flags(parser)
    parser.add_argument("--data_path", nargs="+", help="held-out conversations")
    parser.add_argument("--data_format", default="auto", help="format of the records (default: auto)")
    parser.add_argument("--output", required=True, type=parse_output, help="folder of the report")
    parser.add_argument(
        "--limit", type=int,
        help="most questions (of each benchmark), drawn by the seed; with --perplexity most windows of the longest "
        "length, from the beginning (default: all)",
    )  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int, help="length limit of an answer (default: 256; --tasks: 512)")
    parser.add_argument("--seed", type=int, default=42, help="seed of draws and intervals (default: 42)")
    parser.add_argument("--no_general", action="store_true", help="leave out the general questions")
    for name, meaning in SCORES.items():
        parser.add_argument(f"--min_{name}", type=float, metavar="SHARE", help=f"least mean of: {meaning}")
    parser.add_argument("--tool_use", metavar="FILE", help="conversations with tools, whose calls are scored")
    add_task_flags(parser)
    add_perplexity_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    args = parser.parse_args(argv)
    check_kind(parser, args)
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit} is out of range; give 1 or more")
    if not 1 <= args.max_new_tokens <= _MOST_TOKENS:
        parser.error(f"--max_new_tokens {args.max_new_tokens} is out of range; give 1 to {_MOST_TOKENS}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed} is out of range; give 0 to {2**32 - 1}")
    for name, least in bounds_of(args).items():
        if not 0 <= least <= 1:
            parser.error(f"--min_{name} {least:g} is out of range; give 0 to 1")
    return args


def add_perplexity_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("perplexity of a text")
    group.add_argument("--perplexity", metavar="FILE", help='UTF-8 text (.txt), or records {"text": ...}')
    lengths = ",".join(map(str, LENGTHS))
    group.add_argument("--lengths", type=parse_lengths, help=f"tokens of the windows (default: {lengths})")
    group.add_argument(
        "--variants", type=parse_variants,
        help=f"of {', '.join(VARIANTS)}, separated by commas (default: all that the models have)",
    )  # fmt: skip
    group.add_argument("--rope_scaling", choices=["yarn"], help="what the variant yarn is, as in training")
    group.add_argument(
        "--rope_factor", type=float, help="with --rope_scaling: positions afterwards, divided by those before"
    )
    group.add_argument(
        "--rope_original_length", type=int, help="with --rope_scaling: positions before (default: of config.json)"
    )


def parse_lengths(text: str) -> list[int]:
    lengths = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(2 <= length <= _MOST_TOKENS for length in lengths):
        what = f"{text!r}: lengths are whole numbers from 2 to {_MOST_TOKENS}, separated by commas"
        raise argparse.ArgumentTypeError(what)
    return lengths


def parse_variants(text: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name in UNPUBLISHED:
            raise argparse.ArgumentTypeError(f"{name}: {UNPUBLISHED[name]}")
        if name not in VARIANTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(VARIANTS)}")
    return names


KINDS = {
    "data_path": ("no_general", *(f"min_{name}" for name in SCORES)),
    "tasks": TASK_FLAGS,
    "tool_use": (),
    "perplexity": ("lengths", "variants", "rope_scaling", "rope_factor", "rope_original_length"),
}
"""Flags that ask for a kind of evaluation, with those that only it has."""
_SHORTER = "Lower --max_new_tokens, leave out the longest conversations, or evaluate a quantised checkpoint"
LESS_MEMORY = {
    "data_path": _SHORTER,
    "tasks": "Lower --batch_size: what has been answered is kept; or --num_fewshot, with another --output",
    "tool_use": _SHORTER,
    "perplexity": "Leave out the longest of --lengths: what has been measured is kept",
}
"""What to do about memory that does not suffice, by kind."""
_OF_ANSWERS = ("data_format", "max_new_tokens")


def check_kind(parser: CommandParser, args: argparse.Namespace) -> None:
    """Check that one kind of evaluation is asked for, without flags of another."""
    given = [name for name in KINDS if getattr(args, name) is not None]
    if len(given) != 1:
        parser.error(f"give one of {', '.join(f'--{name}' for name in KINDS)}")
    args.kind = given[0]
    if "" in (value if isinstance(value := getattr(args, args.kind), list) else [value]):
        parser.error(f"--{args.kind} '' names nothing")
    useless = {name: f"without --{kind}" for kind, flags in KINDS.items() if kind != args.kind for name in flags}
    if args.perplexity is not None:
        useless |= dict.fromkeys((*_OF_ANSWERS, *PROMPT_FLAGS), "with --perplexity")
    elif args.tasks is not None and not args.apply_chat_template:
        useless |= dict.fromkeys(PROMPT_FLAGS, "without --apply_chat_template")
    for name, why in useless.items():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} has no effect {why}")
    if args.max_new_tokens is None:
        args.max_new_tokens = 512 if args.kind == "tasks" else 256
    args.yarn = None
    if args.perplexity is not None:
        names = ("rope_scaling", "rope_factor", "rope_original_length")
        model = ModelArguments(**{name: getattr(args, name) for name in names})
        for fault in rope_flag_faults(model):
            raise fault
        args.yarn = model.yarn
        args.lengths = args.lengths or list(LENGTHS)
        if args.yarn and args.variants is not None and "yarn" not in args.variants:
            parser.error("--rope_scaling yarn has no effect without yarn in --variants")


def bounds_of(args: argparse.Namespace) -> dict[str, float]:
    return {name: value for name in SCORES if (value := getattr(args, f"min_{name}")) is not None}


def main(argv: Sequence[str]) -> int:
    args = parse_args(argv)
    set_up_logging()
    evaluate = {"data_path": evaluate_answers, "perplexity": evaluate_perplexity}.get(args.kind, evaluate_questions)
    try:
        return evaluate(args)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"out of memory ({one_line(error)})", LESS_MEMORY[args.kind]) from None


def folders_of(args: argparse.Namespace) -> list[Path]:
    """Return the folders of the models, as far as they are on this disk."""
    given = (args.model_name_or_path, args.adapter, *args.against)
    return [folder for each in given if each is not None and (folder := Path(each)).is_dir()]


def evaluate_answers(args: argparse.Namespace) -> int:
    """Let the models answer held-out questions, and write the report; return 1 if a bound is not reached."""
    paths = [parse_source(path).path for path in args.data_path]
    check_shared_folder(args.output, "--output", {"--data_path": paths, "a model": folders_of(args)})
    with importing():
        from tqdm import tqdm

        from evaluation.evaluating import GENERAL, GENERAL_SET, HELD_OUT, Opened, Sets, subjects_of
        from evaluation.kept import KeptRows

    subjects = subjects_of(args)
    of_each = []
    for subject in subjects:  # all, before the first is loaded: a fault of the last one would come after hours
        sets = Sets(Opened(subject, args.any_base), args.max_new_tokens)
        sets.read(HELD_OUT, args.data_path, args.data_format, args.limit, args.seed)
        if not args.no_general:
            sets.read(GENERAL_SET, [str(GENERAL)], "messages", None, args.seed)
        of_each.append(sets)
    check_bounds(args, of_each[judged_of(subjects)])
    places = common_places(of_each)
    args.output.mkdir(parents=True, exist_ok=True)
    total = sum(len(questions) for sets in of_each for questions in sets.questions.values())
    with KeptRows(args.output / "answers.jsonl", run_of(args, of_each, paths)) as kept:
        with tqdm(total=total, initial=len(kept.rows), desc="Answering", unit="answer", disable=None) as bar:
            for sets in of_each:
                sets.evaluate(kept, bar.update)
        return write_report(args, subjects, kept.rows, places)


def evaluate_questions(args: argparse.Namespace) -> int:
    """Let the models answer the questions of benchmarks, or call functions, and write the report."""
    has_tasks = args.kind == "tasks"
    if has_tasks:
        check_task_flags(args)
    inputs = {"--data_dir": [args.data_dir]} if has_tasks else {"--tool_use": [Path(args.tool_use)]}
    check_shared_folder(args.output, "--output", {**inputs, "a model": folders_of(args)})
    if has_tasks:
        items = read_items(args)
        check_harness()
    with importing():
        from tqdm import tqdm

        from evaluation.evaluating import Opened, subjects_of
        from evaluation.kept import KeptRows
        from evaluation.tool_use import ToolRun, read_tool_questions

    subjects = subjects_of(args)
    models = [Opened(subject, args.any_base) for subject in subjects]
    run: Any
    if has_tasks:
        from evaluation.tasks import TaskRun

        run = TaskRun(args, items, models)
    else:
        questions = read_tool_questions(Path(args.tool_use), args.data_format, args.limit, args.seed)
        run = ToolRun(args, questions, models)
    args.output.mkdir(parents=True, exist_ok=True)
    identity = {**run.identity(), **Prompts.of(args).identity(), "models": weights_of(models)}
    with KeptRows(args.output / "answers.jsonl", identity) as kept:
        with tqdm(total=run.total, initial=len(kept.rows), desc="Answering", unit="answer", disable=None) as bar:
            rows = run.answer(kept, bar.update)
        return write_report(args, subjects, rows, run.places)


def judged_of(subjects: Sequence[Subject]) -> int:
    """Return the index of the model that the bounds are for."""
    return min(1, len(subjects) - 1)


def check_bounds(args: argparse.Namespace, sets: Sets) -> None:
    """Check that answers can have the scores of the bounds.

    Raises:
        ConfigError: none of the expected answers has one.
    """
    from evaluation.evaluating import HELD_OUT

    questions = sets.questions[HELD_OUT]
    known = sets.answerer.score_names(questions)
    for name, least in bounds_of(args).items():
        if name not in known:
            what = f"--min_{name} {least:g}: none of the {len(questions)} expected answers has {name}"
            raise ConfigError(what, f"Give a bound of {', '.join(known)}, or data with such answers")


def common_places(of_each: Sequence[Sets]) -> dict[str, list[str]]:
    """Return the questions of each set that all models can answer, in the order of the first model."""
    places: dict[str, list[str]] = {}
    for name, questions in of_each[0].questions.items():
        others = [{each.where for each in sets.questions[name]} for sets in of_each[1:]]
        places[name] = [each.where for each in questions if all(each.where in other for other in others)]
        if left_out := len(questions) - len(places[name]):
            logger.warning("%s: %d questions are left out, which not all models can be asked", name, left_out)
    return places


def run_of(args: argparse.Namespace, of_each: Sequence[Sets], paths: Sequence[Path]) -> dict[str, Any]:
    """Return what decides the answers: flags, weights and data."""
    models = weights_of([sets.opened for sets in of_each])
    names = ("data_path", "data_format", "limit", "max_new_tokens", "seed", "no_general")
    flags = {name: getattr(args, name) for name in names} | Prompts.of(args).identity()
    return {**flags, "models": models, "data": digest_of(paths)}


def digest_of(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in (file for each in paths for file in data_files(each)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def weights_of(models: Sequence[Opened]) -> dict[str, list[str | None]]:
    """Return what identifies the weights of models and their adapters, by the models' labels."""
    from checkpoints.names import ADAPTER_WEIGHTS
    from checkpoints.shards import fingerprint

    found = {}
    for each in models:
        adapter = each.subject.adapter
        of_adapter = None if adapter is None else fingerprint(adapter, ADAPTER_WEIGHTS)
        found[each.label] = [fingerprint(each.checkpoint.folder), of_adapter]
    return found


def write_report(args: argparse.Namespace, subjects: Sequence[Subject], rows: Any, places: dict[str, list[str]]) -> int:
    """Write and print the report; return 1 if a bound is not reached."""
    from checkpoints.files import save_json, save_text
    from evaluation.comparison import failed_bounds
    from evaluation.evaluating import HELD_OUT
    from evaluation.page import render_page
    from evaluation.report import build_report, render_tables

    labels = [subject.label for subject in subjects]
    report = build_report(rows, labels, places, args.seed)
    judged = labels[judged_of(subjects)]
    figures = report["sets"][HELD_OUT]["figures"][judged] if HELD_OUT in places else {}
    scores = {name: each["value"] for name, each in figures.items()}
    models = [{"label": each.label, "model": each.model, "adapter": each.adapter} for each in subjects]
    failed = [f"{judged}: {line}" for line in failed_bounds(scores, bounds_of(args))]
    report = {"models": models, "bounds": bounds_of(args), "failed": failed, **report}
    save_json(report, args.output / "report.json")
    save_text(render_page(report, rows, places), args.output / "report.html")
    for table in render_tables(report):
        show(table)
    show(f"{args.output / 'report.html'} has the answers side by side")
    for line in failed:
        logger.error("%s", line)
    return 1 if failed else 0


def evaluate_perplexity(args: argparse.Namespace) -> int:
    """Measure the perplexities, and write the report."""
    path = Path(args.perplexity)
    try:
        data_files(path)
    except DataError as error:
        raise ConfigError(f"--perplexity {error}") from None
    check_shared_folder(args.output, "--output", {"--perplexity": [path], "a model": folders_of(args)})
    with importing():
        from tqdm import tqdm

        from evaluation.evaluating import subjects_of
        from evaluation.kept import KeptRows
        from evaluation.perplexity import WINDOW_KEY, Reading, Windows, common_ids, common_variants

    subjects = subjects_of(args)
    readings = [Reading(subject, args.yarn, args.any_base) for subject in subjects]
    variants = common_variants(readings, args.variants)
    ids = common_ids(readings, path)
    windows = Windows(ids, args.lengths, args.limit, str(path))
    run = {
        "models": weights_of([each.opened for each in readings]),
        "positions": {each.opened.label: each.variants.settings() for each in readings},
        "text": hashlib.sha256(ids.tobytes()).hexdigest(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    with KeptRows(args.output / "windows.jsonl", run, WINDOW_KEY) as kept:
        tokens = [reading.tokens(windows, variants, kept) for reading in readings]
        total, done = (sum(column) for column in zip(*tokens, strict=True))
        with tqdm(total=total, initial=done, desc="Reading", unit="token", unit_scale=True, disable=None) as bar:
            for reading in readings:
                with reading.opened:
                    reading.measure(windows, variants, kept, bar.update)
        return write_perplexities(args, readings, variants, windows, kept.rows)


def write_perplexities(
    args: argparse.Namespace, readings: Sequence[Reading], variants: Sequence[str], windows: Windows, rows: Any
) -> int:
    """Write and print the table of perplexities."""
    from checkpoints.files import save_json, save_text
    from evaluation.perplexity_report import build_report, render_page, render_table

    labels = [reading.opened.label for reading in readings]
    settings = [{name: each.variants.settings(name) for name in variants} for each in readings]
    models = [
        {"label": each.label, "model": each.model, "adapter": each.adapter, "variants": of_each}
        for each, of_each in zip((reading.opened.subject for reading in readings), settings, strict=True)
    ]
    report = build_report(rows, labels, variants, windows, args.seed)
    report = {"text": str(args.perplexity), "models": models, **report}
    save_json(report, args.output / "perplexity.json")
    save_text(render_page(report), args.output / "perplexity.html")
    show(render_table(report))
    show(f"{args.output / 'perplexity.html'} has the intervals")
    return 0


if __name__ == "__main__":
    run_command(main, "scripts.evaluate")
