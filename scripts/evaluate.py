"""Compare models on held-out questions: ``python -m scripts.evaluate --model_name_or_path BASE --adapter A
--data_path held_out.jsonl --output DIR``.

Each model answers the last turn of each sample greedily, and its loss on all answers is measured; so are forty
general questions, which show what tuning has made it forget. Differences from the base come with 95 % intervals.

The folder has report.json, report.html and answers.jsonl, from which the same command continues a run that was killed.
The exit code is 1 if a bound such as --min_exact_match is not reached by the adapter, or the model of --against, or
the only model.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands import CommandParser, importing, run_command, set_up_logging
from console import show
from data_utils.files import data_files
from data_utils.sources import parse_source
from evaluation.metrics import SCORES
from outputs import check_shared_folder, parse_output

if TYPE_CHECKING:
    from evaluation.evaluating import Sets, Subject

logger = logging.getLogger(__name__)

_MOST_TOKENS = 1 << 20


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
    parser.add_argument("--data_path", required=True, nargs="+", help="held-out conversations")
    parser.add_argument("--data_format", default="auto", help="format of the records (default: auto)")
    parser.add_argument("--output", required=True, type=parse_output, help="folder of the report")
    parser.add_argument("--limit", type=int, help="most questions of --data_path, drawn by the seed (default: all)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="length limit of an answer (default: 256)")
    parser.add_argument("--seed", type=int, default=42, help="seed of draws and intervals (default: 42)")
    parser.add_argument("--no_general", action="store_true", help="leave out the general questions")
    for name, meaning in SCORES.items():
        parser.add_argument(f"--min_{name}", type=float, metavar="SHARE", help=f"least mean of: {meaning}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    args = parser.parse_args(argv)
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


def bounds_of(args: argparse.Namespace) -> dict[str, float]:
    return {name: value for name in SCORES if (value := getattr(args, f"min_{name}")) is not None}


def main(argv: Sequence[str]) -> int:
    args = parse_args(argv)
    set_up_logging()
    paths = [parse_source(path).path for path in args.data_path]
    folders = [Path(each) for each in (args.model_name_or_path, args.adapter, *args.against) if each is not None]
    inputs = {"--data_path": paths, "a model": [folder for folder in folders if folder.is_dir()]}
    check_shared_folder(args.output, "--output", inputs)
    with importing():
        from tqdm import tqdm

        from evaluation.evaluating import GENERAL, GENERAL_SET, HELD_OUT, Sets, subjects_of
        from evaluation.kept import KeptAnswers

    subjects = subjects_of(args.model_name_or_path, args.adapter, args.against)
    of_each = []
    for subject in subjects:  # all, before the first is loaded: a fault of the last one would come after hours
        sets = Sets(subject, args.max_new_tokens, args.any_base)
        sets.read(HELD_OUT, args.data_path, args.data_format, args.limit, args.seed)
        if not args.no_general:
            sets.read(GENERAL_SET, [str(GENERAL)], "messages", None, args.seed)
        of_each.append(sets)
    places = common_places(of_each)
    args.output.mkdir(parents=True, exist_ok=True)
    total = sum(len(questions) for sets in of_each for questions in sets.questions.values())
    with KeptAnswers(args.output / "answers.jsonl", run_of(args, of_each, paths)) as kept:
        with tqdm(total=total, initial=len(kept.rows), desc="Answering", unit="answer", disable=None) as bar:
            for sets in of_each:
                logger.info("%s: %s", sets.subject.label, sets.subject.adapter or sets.subject.model)
                sets.evaluate(kept, bar.update)
        return write_report(args, subjects, kept.rows, places)


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
    from checkpoints.names import ADAPTER_WEIGHTS
    from checkpoints.shards import fingerprint

    digest = hashlib.sha256()
    for path in (file for each in paths for file in data_files(each)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    models = {
        sets.subject.label: [
            fingerprint(sets.checkpoint.folder),
            None if sets.subject.adapter is None else fingerprint(sets.subject.adapter, ADAPTER_WEIGHTS),
        ]
        for sets in of_each
    }
    flags = {name: getattr(args, name) for name in ("data_path", "data_format", "limit", "max_new_tokens", "seed")}
    return {**flags, "no_general": args.no_general, "models": models, "data": digest.hexdigest()}


def write_report(args: argparse.Namespace, subjects: Sequence[Subject], rows: Any, places: dict[str, list[str]]) -> int:
    """Write and print the report; return 1 if a bound is not reached."""
    from checkpoints.files import save_json, save_text
    from evaluation.comparison import failed_bounds
    from evaluation.evaluating import HELD_OUT
    from evaluation.page import render_page
    from evaluation.report import build_report, render_tables

    labels = [subject.label for subject in subjects]
    report = build_report(rows, labels, places, args.seed)
    judged = labels[min(1, len(labels) - 1)]
    scores = {name: each["value"] for name, each in report["sets"][HELD_OUT]["figures"][judged].items()}
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


if __name__ == "__main__":
    run_command(main, "scripts.evaluate")
