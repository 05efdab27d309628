"""The JSON file with the results of a benchmark: its flag, checked before anything is measured, and its writer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints.files import save_text
from errors import ConfigError
from outputs import check_output_file, parse_output


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str], default: Path) -> argparse.Namespace:
    """Add ``--output`` to a benchmark's parser and parse its arguments; exit with code 2 if the file is unusable."""
    parser.add_argument("--output", type=parse_output, default=default, help="file to write")
    args = parser.parse_args(argv)
    try:
        check_output_file(args.output, "--output")
    except ConfigError as error:
        parser.error(str(error))
    return args


def save_results(results: Mapping[str, Any], path: Path) -> None:
    save_text(json.dumps(results, indent=1) + "\n", path)
