"""Seconds until finetune.py has printed its help or refused a flag, compared with importing torch and transformers.

    python -m benchmarks.startup

Runs the commands in turn, five rounds, and writes the medians to benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.results_file import parse_args, save_results
from commands import HelpFormatter

ROOT = Path(__file__).parents[1]
IMPORT = "import torch, transformers.trainer"
COMMANDS = {
    IMPORT: ["-c", IMPORT],
    "finetune.py --help": ["finetune.py", "--help"],
    "finetune.py --help_all": ["finetune.py", "--help_all"],
    "finetune.py --use_lorra (refused)": ["finetune.py", "--use_lorra"],
    "finetune.py --lora_r many (refused)": ["finetune.py", "--lora_r", "many"],
    "finetune.py --lora_r 8 (refused)": ["finetune.py", "--lora_r", "8"],
}


def measure_startup(rounds: int) -> dict[str, float]:
    """Return the median seconds of each command. The commands take turns, so that load affects all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=False)
            seconds[name].append(time.perf_counter() - started)
            expected = 2 if name.endswith("(refused)") else 0
            assert result.returncode == expected, f"{name}: {result.stderr.decode()}"
    return {name: round(statistics.median(times), 4) for name, times in seconds.items()}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parse_args(parser, argv, ROOT / "benchmarks" / "results" / "startup.json")
    measure_startup(1)  # fills the file system's cache
    seconds = measure_startup(args.rounds)
    shares = {name: round(value / seconds[IMPORT], 4) for name, value in seconds.items()}
    for name, value in seconds.items():
        print(f"{value:8.3f} s {shares[name]:7.3f}x  {name}")
    result: dict[str, Any] = {
        "command": "python -m benchmarks.startup",
        "rounds": args.rounds,
        "median_seconds": seconds,
        "share_of_import": shares,
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    save_results(result, args.output)


if __name__ == "__main__":
    main(sys.argv[1:])
