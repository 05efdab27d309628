"""Plot the losses of several runs: ``python -m scripts.plot_runs RUN... [--output FILE.png]``.

A run is the output folder of ``finetune.py``, or a ``training_log.jsonl``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from checkpoints.names import TRAINING_LOG
from commands import CommandParser, run_command
from console import show
from errors import ConfigError, one_line
from outputs import check_output_file, parse_output
from training.run_folder.curves import Row, load_rows, plot_losses


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m scripts.plot_runs", description="Plot the losses of several runs.", allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"output folder of a run, or its {TRAINING_LOG}")
    parser.add_argument(
        "--output", type=parse_output, default="runs.png", metavar="FILE", help="image to write (default: runs.png)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def log_of(run: Path) -> Path:
    return run / TRAINING_LOG if run.is_dir() else run


def load_run(run: Path) -> list[Row]:
    """Load the rows of a run's log.

    Raises:
        ConfigError: no log, or a log without losses.
        DataError: a broken log.
    """
    path = log_of(run)
    if not path.is_file():
        what = f"the folder contains no {TRAINING_LOG}" if run.is_dir() else "no such file or folder"
        raise ConfigError(f"{run}: {what}", "Give the output folder of finetune.py")
    rows = load_rows(path)
    if not any("loss" in row or "eval_loss" in row for row in rows):
        raise ConfigError(f"{path}: no loss was logged", "Give a run with at least one logged step")
    return rows


def names_of(runs: Sequence[Path]) -> list[str]:
    """Return the runs' names for the legend: the folder's name, with parent folders as far as needed to be unique."""
    folders = [(run if run.is_dir() else run.parent).resolve() for run in runs]
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    return names


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    runs = [Path(run) for run in args.runs]
    output: Path = args.output
    check_output_file(output, "--output", {"RUN": [log_of(run) for run in runs]})
    curves = dict(zip(names_of(runs), [load_run(run) for run in runs], strict=True))
    try:
        plot_losses(curves, output)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # a missing folder, an ending that is not an image format
        raise ConfigError(
            f"--output {output}: {one_line(error)}", "Give a .png file in a folder that exists"
        ) from error
    show(f"{len(curves)} {'run' if len(curves) == 1 else 'runs'}: {output}")


if __name__ == "__main__":
    run_command(main, "scripts.plot_runs")
