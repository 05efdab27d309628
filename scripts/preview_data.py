"""Show data as it would be trained: ``python -m scripts.preview_data --model_name_or_path DIR --data_path FILE``.

Prints samples with the trained tokens in colour, then the records read, skipped and shortened, lengths, padding and
steps. ``--dump`` writes the examples themselves. Accepts all flags of finetune.py, so the arguments of a run can be
used unchanged. Starts no processes and reads no weights. The exit code is 1 if the report contains a problem that would
make the run worthless.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from commands import CommandParser, run_command, set_up_logging
from outputs import parse_output, staged_file
from processes import forget_launcher


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags of this command, and the remaining arguments for finetune.py."""
    parser = CommandParser(
        prog="python -m scripts.preview_data",
        usage="python -m scripts.preview_data --model_name_or_path DIR --data_path FILE... [flags of finetune.py]",
        description="Show data as it would be trained.",
        epilog="Accepts all flags of finetune.py as well; see python finetune.py --help.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--samples", type=int, default=3, metavar="N", help="number of samples to show of each set (default: 3)"
    )
    parser.add_argument("--json", type=parse_output, metavar="OUT", help="write the report as JSON to this file")
    parser.add_argument(
        "--html", type=parse_output, metavar="OUT", help="write the report as a single HTML page to this file"
    )
    parser.add_argument(
        "--dump",
        type=parse_output,
        metavar="OUT",
        help="write the examples as they are trained to this file, one per line",
    )
    parser.add_argument("--most", type=int, metavar="N", help="with --dump: write the first N examples only")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="number of processes of the run (default: 1)"
    )
    args, others = parser.parse_known_args(argv)
    if args.samples < 0:
        parser.error(f"--samples {args.samples} is out of range; give 0 or more")
    if args.processes < 1:
        parser.error(f"--processes {args.processes} is out of range; give 1 or more")
    if args.most is not None and (args.most < 1 or args.dump is None):
        parser.error(f"--most {args.most} " + ("needs --dump" if args.dump is None else "is too few; give 1 or more"))
    return args, others


def main(argv: Sequence[str]) -> int:
    forget_launcher()
    args, others = parse_args(argv)
    forget_launcher(args.processes)
    from training.checks import check_args
    from training.config.parsing import parse_args as parse_run_args
    from training.run_folder.prepare import check_report_files

    set_up_logging()
    run = parse_run_args([*others, "--dry_run"])
    check_args(run)
    check_report_files(run, others, {"--json": args.json, "--html": args.html, "--dump": args.dump})

    from data_utils.dump import ExampleDump, open_dump
    from training.data import preview_data, show_reports, write_reports

    if args.dump is None:
        reports = preview_data(run, args.samples)
    else:
        with staged_file(args.dump) as staging, open_dump(staging) as file:
            reports = preview_data(run, args.samples, ExampleDump(file, args.most).add)
    write_reports(reports, args.json, args.html)
    return show_reports(reports)


if __name__ == "__main__":
    run_command(main, "scripts.preview_data", prints_result=True)
