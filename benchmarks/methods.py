"""Cost of methods and optimizers: time and memory of an optimizer step beside that of plain LoRA, or of AdamW.

    python -m benchmarks.methods [--shape small] [--groups lora full] [--rounds 7]

Every method of a group trains the same random model of ``benchmarks.step`` (vocabulary of 151,936) on the same samples
in the same order, 2 x 2 of them per step, at most 512 tokens each, in float32 and without gradient checkpointing. Each
is a process that lives through the run and does one step per round, in turn with the others; start, loading and the
first step are not counted. Figures are medians over rounds of the ratio to the group's first method in the same round;
memory is the peak of RssAnon during the counted steps above its value after the imports.

It refuses to begin a round while other processes use the machine; ``--busy`` measures all the same and records that.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.results_file import parse_args, save_results
from benchmarks.step import ROOT, SHARED, Process, Row, check_others, machine, others_during, settings, started
from benchmarks.step_contenders import Task
from benchmarks.step_inputs import read_samples, write_model, write_tokenizer
from commands import HelpFormatter, run_command

RESULTS = ROOT / "benchmarks" / "results" / "methods.json"
BATCH, ACCUMULATION = 2, 2
# Group: mode of `benchmarks.step`, and the flags of each method; the first is what the others are compared with.
GROUPS: dict[str, dict[str, list[str]]] = {
    "lora": {
        "plain LoRA": [],
        "rsLoRA": ["--use_rslora"],
        "DoRA": ["--use_dora"],
        "PiSSA, OLoRA": ["--init_lora_weights", "pissa_niter_2"],  # a step of either is the same
        "LoRA+": ["--loraplus_lr_ratio", "16"],
        "NEFTune": ["--neftune_noise_alpha", "5"],
    },
    "full": {
        "AdamW": [],
        "Adafactor": ["--optim", "adafactor"],
        "SGD": ["--optim", "sgd"],
        "schedule-free AdamW": ["--optim", "schedule_free_adamw", "--lr_scheduler_type", "constant",
                                "--warmup_steps", "0"],
    },
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--shape", choices=("small", "real"), default="small")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=7, help="optimizer steps of each method (default: 7)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a process (default: all CPUs)")
    parser.add_argument("--busy", action="store_true", help="measure although others use the machine")
    parser.add_argument("--data_path", type=Path, default=SHARED / "corpora" / "alpaca_en_demo.json")
    parser.add_argument(
        "--tokenizer", type=Path, default=SHARED / "golden" / "tiny-qwen", help="folder of Qwen v1, for its tokenizer"
    )
    args = parse_args(parser, argv, RESULTS)
    if not args.busy:
        check_others(others_during(lambda: time.sleep(3)))
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tokenizer(args.tokenizer, folder / "tokenizer")
        write_model(args.shape, folder / "tokenizer", folder / "model")
        for group in args.groups:
            results[group] = summarise(measure(args, group, folder))
            about = {
                "command": "python -m benchmarks.methods", "machine": machine(args.threads),
                "settings": {**settings(args.data_path), "shape": args.shape, "samples_per_step": BATCH * ACCUMULATION},
            }  # fmt: skip
            save_results({**about, "results": results}, args.output)
            print(as_table(results[group]), flush=True)
    return 0


def measure(args: argparse.Namespace, group: str, folder: Path) -> dict[str, list[Row]]:
    """Return the row of every round, by method."""
    samples = read_samples(folder / "model", args.data_path, 0, args.rounds)
    samples.write("same", 0, folder / group)
    rows: dict[str, list[Row]] = {name: [] for name in GROUPS[group]}
    with ExitStack() as stack:
        processes: dict[str, Process] = {}
        for number, (name, flags) in enumerate(GROUPS[group].items()):
            output = str(folder / group / f"output-{number}")
            task = Task(
                "ours_flat", group, str(folder / "model"), str(folder / group), output, BATCH, ACCUMULATION,
                seed=0, flags=tuple(flags),
            )  # fmt: skip
            processes[name] = stack.enter_context(started(task, args.threads))
        for number in range(args.rounds):
            if not args.busy:
                check_others(others_during(lambda: time.sleep(1)))
            for name, process in processes.items():
                row = {"busy": args.busy, **process.step()}
                rows[name].append(row)
                print(
                    f"{group:<5} round {number + 1} {name:<20}{row['seconds']:7.2f} s {row['memory_mib']:6.0f} MiB",
                    flush=True,
                )
    return rows


def summarise(rows: dict[str, list[Row]]) -> dict[str, Row]:
    """Return the figures of each method, beside the first one's."""
    first = next(iter(rows.values()))

    def middle(values: Any, digits: int) -> float:
        return round(statistics.median(values), digits)

    return {
        name: {
            "seconds_per_step": middle((row["seconds"] for row in own), 3),
            "time_to_first": middle(
                (row["seconds"] / base["seconds"] for row, base in zip(own, first, strict=True)), 2
            ),
            "memory_mib": max(row["memory_mib"] for row in own),
            "memory_to_first_mib": max(row["memory_mib"] for row in own) - max(row["memory_mib"] for row in first),
            "rounds": own,
        }
        for name, own in rows.items()
    }


def as_table(results: dict[str, Row]) -> str:
    """Return the summary as a table in Markdown."""
    lines = ["", "| | s per step | time, first = 1 | memory, MiB | more than the first |", "|---|---|---|---|---|"]
    for name, row in results.items():
        memory = f"{row['memory_mib']:.0f} | {row['memory_to_first_mib']:+.0f}"
        lines.append(f"| {name} | {row['seconds_per_step']} | {row['time_to_first']} | {memory} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    run_command(main, "benchmarks.methods")
