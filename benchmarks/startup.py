"""Seconds until finetune.py has printed its help or refused a flag, and until a run begins its first forward pass.

    python -m benchmarks.startup [--model_name_or_path DIR] [--data_path alpaca_en_demo.json]

Help and refusals are compared with importing torch and transformers. With a model, a run of finetune.py is started up
to its first forward pass: arguments, checks, tokenizer, data without a cache, weights, adapter, optimizer, reports.
Beside it a plain script loads the same weights and tokenizer, reads the same file and tokenises each record with the
chat template. Both have one thread for data. The time of imports is left out of the ratio, and given.

Runs the commands in turn, five rounds, and writes the medians to benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import json
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
SHARED = Path(os.environ.get("QWEN_SHARED", ROOT.parent / "shared"))
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


def measure_first_step(model: str, data: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median seconds before the first forward pass of a run and of plain loading, for each mode."""
    pairs = [(mode, contender) for mode in ("lora", "full") for contender in ("run", "plain")]
    seconds: dict[tuple[str, str], list[dict[str, float]]] = {pair: [] for pair in pairs}
    for number in range(rounds + 1):
        for mode, contender in pairs:
            command = [sys.executable, "-m", "benchmarks.startup_contenders", contender, mode, model, data]
            result = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
            assert result.returncode == 0, f"{mode}, {contender}: {result.stderr.decode()}"
            if number:  # the first round fills the file system's cache
                seconds[mode, contender].append(json.loads(result.stdout.splitlines()[-1]))
    medians = {}
    for mode in ("lora", "full"):
        row = {
            f"{contender}, {part}": round(statistics.median(each[part] for each in seconds[mode, contender]), 3)
            for contender in ("run", "plain")
            for part in ("imports", "rest")
        }
        ratios = [
            run["rest"] / plain["rest"] for run, plain in zip(seconds[mode, "run"], seconds[mode, "plain"], strict=True)
        ]
        medians[mode] = row | {"ratio of the rest": round(statistics.median(ratios), 3)}
    return medians


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model_name_or_path", help="measure until the first step of a run on this model, too")
    parser.add_argument(
        "--data_path", default=str(SHARED / "corpora" / "alpaca_en_demo.json"), help="its data, in alpaca's format"
    )
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
    if args.model_name_or_path:
        result["command"] += f" --model_name_or_path DIR --data_path {Path(args.data_path).name}"
        result["first_step"] = measure_first_step(args.model_name_or_path, args.data_path, args.rounds)
        for mode, row in result["first_step"].items():
            print(f"{mode}: {row}")
    save_results(result, args.output)


if __name__ == "__main__":
    main(sys.argv[1:])
