"""Look at data as it would be trained: ``python -m scripts.preview_data --model_name_or_path DIR --data_path FILE``.

Samples with the trained tokens in colour, then what was read, skipped and shortened, lengths, padding and steps. Takes
all flags of finetune.py, so the line of a run can be used as it is; nothing is trained, and no weights are read. Exit
code 1 says that something would make the run worthless.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from commands import CommandParser, run_command, set_up_logging
from errors import ConfigError


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this command, and what is left for finetune.py."""
    parser = CommandParser(
        prog="python -m scripts.preview_data",
        usage="python -m scripts.preview_data --model_name_or_path DIR --data_path FILE... [flags of finetune.py]",
        description="Look at data as it would be trained.",
        epilog="All flags of finetune.py are taken too; python finetune.py --help shows those of the data.",
        allow_abbrev=False,
    )
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="samples of each set to show; default 3")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write one page to look at or to send to somebody")
    args, others = parser.parse_known_args(argv)
    if args.samples < 0:
        parser.error(f"--samples {args.samples} is not possible; give 0 or more")
    for flag, path in (("--json", args.json), ("--html", args.html)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"{flag} {path} cannot be written", "Name a file in a folder that exists")
    return args, others


def main(argv: Sequence[str]) -> int:
    args, others = parse_args(argv)
    from training.checks import check_args
    from training.config.parsing import parse_args as parse_run_args

    set_up_logging()
    run = parse_run_args([*others, "--dry_run"])
    check_args(run)

    from training.data import preview_data, show_reports, write_reports

    reports = preview_data(run, args.samples)
    write_reports(reports, args.json, args.html)
    return show_reports(reports)


if __name__ == "__main__":
    run_command(main, "preview_data")
