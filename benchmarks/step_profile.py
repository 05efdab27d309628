"""Where the time of an optimizer step goes: by phase and kind of operation, and by operator.

    python -m benchmarks.step_profile [--shape real] [--mode lora] [--contenders ours_flat hf_flat] [--flags FLAGS]

The contenders of ``benchmarks.step`` train as there, one after the other; torch's profiler records the second optimizer
step of each. Times are an operator's own, without those that it calls; what remains of the step's time is Python's
and the autograd engine's. The page faults of a step and the CPU seconds that the kernel took are counted as well: they
are part of the operators that touch new memory first. The profiler itself makes a step up to a tenth slower.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results_file import parse_args, save_results
from benchmarks.step import ROOT, SHARED, machine
from benchmarks.step_contenders import CONTENDERS, MODES, Task, run_hf, run_ours, run_trl
from benchmarks.step_inputs import SHAPES, STEP_SAMPLES, read_samples, write_model, write_tokenizer
from commands import HelpFormatter, run_command
from errors import RunError

RESULTS = ROOT / "benchmarks" / "results" / "step_profile.json"
KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "_linear_pointwise"),
    "dropout": ("bernoulli_", "native_dropout", "dropout", "random_"),
    "copies": ("copy_", "cat", "fill_", "zero_", "index_select", "index", "embedding_dense_backward"),
}  # the other operators of aten: attention by its name, the rest are elementwise operations and sums
SHOWN = 0.01
"""Operators are shown from this share of the step on."""

Event = Any


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_profile", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="real")
    parser.add_argument("--mode", choices=MODES, default="lora")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["ours_flat", "hf_flat"])
    parser.add_argument("--flags", default="", help="more flags of finetune.py, for ours alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all CPUs")
    parser.add_argument("--data_path", type=Path, default=SHARED / "corpora" / "alpaca_en_demo.json")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "golden" / "tiny-qwen", help="folder of Qwen v1")
    args = parse_args(parser, argv, RESULTS)
    file = json.loads(args.output.read_text()) if args.output.is_file() else {}
    results = file.get("results", {})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tokenizer(args.tokenizer, folder / "tokenizer")
        write_model(args.shape, folder / "tokenizer", folder / "model")
        samples = read_samples(folder / "model", args.data_path, 0, 1)
        for name in args.contenders:
            place = folder / name
            samples.write(CONTENDERS[name].order, 0, place)
            output = str(place / "output")
            task = Task(name, args.mode, str(folder / "model"), str(place), output, 2, STEP_SAMPLES // 2, seed=0)
            row = profile_in_process(task, args.flags, args.threads)
            key = " ".join([args.shape, args.mode, name, args.flags]).strip()
            show(key, row)
            results[key] = row
    command = "python -m benchmarks.step_profile"
    save_results({"command": command, "machine": machine(args.threads), "results": results}, args.output)


def profile_in_process(task: Task, flags: str, threads: int) -> dict[str, Any]:
    """Return the profile of a contender's second optimizer step.

    Raises:
        RunError: it fails.
    """
    report = Path(task.samples) / "profile.json"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    code = "import sys; from benchmarks.step_profile import run_profiled; run_profiled(*sys.argv[1:])"
    command = [sys.executable, "-c", code, task.to_json(), flags, str(report)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if not report.is_file():
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{task.name} ended with exit code {result.returncode}: {last}", "See its message")
    row: dict[str, Any] = json.loads(report.read_text())
    return row


def run_profiled(task_json: str, flags: str, report: str) -> None:
    """Train until the end of the second optimizer step, write its profile, and end the process."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback, trainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    task = Task(**json.loads(task_json))
    profiler = profile(activities=[ProfilerActivity.CPU])

    class ProfileCallback(TrainerCallback):
        started, before = 0.0, resource.getrusage(resource.RUSAGE_SELF)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                profiler.start()
                self.started, self.before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                seconds, after = time.perf_counter() - self.started, resource.getrusage(resource.RUSAGE_SELF)
                profiler.stop()
                usage = {
                    "page_faults": after.ru_minflt - self.before.ru_minflt,
                    "kernel_cpu_seconds": round(after.ru_stime - self.before.ru_stime, 3),
                    "user_cpu_seconds": round(after.ru_utime - self.before.ru_utime, 3),
                }
                Path(report).write_text(json.dumps({**summarise(profiler.events() or [], seconds), **usage}))
                os._exit(0)

    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    callbacks.append(ProfileCallback())
    kind = CONTENDERS[task.name].kind
    if kind == "ours":
        run_ours(task, shlex.split(flags))
    else:
        {"hf": run_hf, "trl": run_trl}[kind](task)


def summarise(events: Iterable[Event], seconds: float) -> dict[str, Any]:
    """Return the seconds of each phase and kind of operation, and those of each operator that is shown."""
    kinds: defaultdict[tuple[str, str], float] = defaultdict(float)
    operators: defaultdict[tuple[str, str], float] = defaultdict(float)
    calls: Counter[tuple[str, str]] = Counter()
    for event in events:
        own, phase = event.self_cpu_time_total / 1e6, phase_of(event)
        kinds[phase, kind_of(event.name)] += own
        operators[phase, event.name] += own
        calls[phase, event.name] += 1
    kinds["all", "Python and autograd"] += seconds - sum(kinds.values())
    shown = [(key, value) for key, value in most(operators) if value >= SHOWN * seconds]
    return {
        "seconds": round(seconds, 3),
        "kinds": {f"{phase}: {kind}": round(value, 3) for (phase, kind), value in most(kinds)},
        "operators": {
            f"{phase}: {name}": {"seconds": round(value, 3), "calls": calls[phase, name]}
            for (phase, name), value in shown
        },
    }


def most(seconds: Mapping[tuple[str, str], float]) -> list[tuple[tuple[str, str], float]]:
    """Return entries by their seconds, the largest first."""
    return sorted(seconds.items(), key=lambda item: -item[1])


def phase_of(event: Event) -> str:
    """The phase of a step, by the names of the events that an event is part of."""
    while event is not None:
        if event.name.startswith("autograd::engine"):
            return "backward"
        if event.name.startswith("Optimizer.step"):
            return "optimizer"
        if event.name == "_LeanCrossEntropy":
            return "loss"
        event = event.cpu_parent
    return "forward"


def kind_of(name: str) -> str:
    operator = name.removeprefix("aten::").removeprefix("mkldnn::")
    if operator == name:
        return "Python and autograd"
    if "attention" in name:
        return "attention"
    for kind, names in KINDS.items():
        if operator in names:
            return kind
    return "elementwise"


def show(key: str, row: dict[str, Any]) -> None:
    faults, kernel = row["page_faults"], row["kernel_cpu_seconds"]
    print(f"\n{key}: {row['seconds']:.2f} s; {faults} page faults, {kernel:.1f} CPU s in the kernel\n", flush=True)
    print("| phase: kind | s | share |\n|---|---|---|")
    for name, seconds in row["kinds"].items():
        print(f"| {name} | {seconds:.2f} | {seconds / row['seconds']:.1%} |")
    print("\n| phase: operator | s | share | calls |\n|---|---|---|---|")
    for name, operator in row["operators"].items():
        seconds = operator["seconds"]
        print(f"| {name} | {seconds:.2f} | {seconds / row['seconds']:.1%} | {operator['calls']} |", flush=True)


if __name__ == "__main__":
    run_command(main, "benchmarks.step_profile")
