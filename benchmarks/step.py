"""Speed and memory of optimizer steps: this toolkit, the original's way, transformers' Trainer and trl.

    python -m benchmarks.step [--shapes tiny small] [--modes lora] [--contenders ours_flat hf_flat] [--rounds 5] [--add]

Every contender trains the same random model (vocabulary of 151,936) on the same samples in the same order, 2 x 8 of
them per optimizer step, at most 512 tokens each, without gradient checkpointing, and in float32 but for ``ours_bf16``
and ``hf_bf16``, which are ``ours_flat`` and ``hf_flat`` in bfloat16. Only packs take other samples: those of the whole
file, in steps of about as many tokens. Each contender is a process of its own that lives through the run and does one
optimizer step per round, in turn with the others; on the shape ``real``, whose processes need up to 5 GB each, it is
started anew in every round, so that only one exists at a time. ``--keep_alive`` keeps all of them, if memory suffices
for the weights and optimizer states of all. Start, loading and the first step are not counted. Figures are medians over
rounds, memory is the peak of RssAnon during the counted steps above its value after the imports.

It refuses to begin a round while other processes use the machine; ``--busy`` measures all the same and records that.
Results are saved after each round, by shape and mode: a run replaces those of its contenders, ``--add`` adds rounds to
them. trl is measured if it is installed (``pip install trl``).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.loss import anonymous_memory
from benchmarks.results_file import parse_args, save_results
from benchmarks.step_contenders import CONTENDERS, MODES, Task
from benchmarks.step_inputs import (
    MAX_LENGTH,
    SHAPES,
    STEP_SAMPLES,
    Samples,
    read_samples,
    write_model,
    write_tokenizer,
)
from commands import HelpFormatter, run_command
from errors import ConfigError, RunError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "step.json"
SHARED = Path(os.environ.get("QWEN_SHARED") or ROOT.parent / "shared")
LONE_SHAPES = ("real",)
"""Shapes of which one process at a time exists."""
MOST_OTHERS = 0.1
"""CPUs that other processes may use while something is measured."""
BASELINE = "hf_flat"
"""Memory is compared with this contender's, speed with the fastest that is not ours."""

Row = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5, help="optimizer steps of each contender (default: 5)")
    parser.add_argument("--keep_alive", action="store_true", help="keep all contenders alive on every shape")
    parser.add_argument("--add", action="store_true", help="add the rounds to those in the file of results")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a process (default: all CPUs)")
    parser.add_argument("--busy", action="store_true", help="measure although others use the machine")
    parser.add_argument("--data_path", type=Path, default=SHARED / "corpora" / "alpaca_en_demo.json")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=SHARED / "golden" / "tiny-qwen",
        help="folder of Qwen v1, whose tokenizer is used",
    )
    args = parse_args(parser, argv, RESULTS)
    names = [name for name in args.contenders if is_installed(name)]
    if not args.busy:
        check_others(others_during(lambda: time.sleep(3)))
    complete = []
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary) / "tokenizer"
        write_tokenizer(args.tokenizer, tokenizer)
        for shape in args.shapes:
            model = Path(temporary) / shape
            write_model(shape, tokenizer, model)
            for mode in args.modes:
                complete.append(Measurement(args, shape, mode, names, model).run())
    return 0 if all(complete) else 1


def is_installed(name: str) -> bool:
    """Return whether a contender's library is installed; print a line if it is not."""
    if CONTENDERS[name].kind != "trl" or importlib.util.find_spec("trl") is not None:
        return True
    print(f"{name}: left out: trl is not installed (pip install trl)", flush=True)
    return False


class Measurement:
    """All rounds of one shape and mode, and their place in the file of results."""

    def __init__(self, args: argparse.Namespace, shape: str, mode: str, names: list[str], model: Path) -> None:
        self.args, self.shape, self.mode, self.names, self.model = args, shape, mode, names, model
        self.failures: dict[str, str] = {}
        saved = json.loads(args.output.read_text()) if args.output.is_file() else {}
        self.file: dict[str, Any] = {"results": {}, **saved}
        entry = self.file["results"].get(shape, {}).get(mode, {"contenders": {}})
        self.contenders: dict[str, Row] = dict(entry["contenders"])
        for name in names:
            if not args.add or name not in self.contenders:
                self.contenders[name] = {"rounds": []}
        self.first = max((len(self.contenders[name]["rounds"]) for name in names), default=0)

    def run(self) -> bool:
        """Measure the rounds; return whether every contender could run."""
        samples = read_samples(self.model, self.args.data_path, self.first, self.args.rounds)
        is_lone = self.shape in LONE_SHAPES and not self.args.keep_alive
        run_id = time.strftime("%Y-%m-%dT%H:%M:%S")
        with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
            processes: dict[str, Process] = {}
            for number in range(self.first, self.first + self.args.rounds):
                if not self.args.busy:
                    check_others(others_during(lambda: time.sleep(1)))
                for name in [name for name in self.names if name not in self.failures]:
                    try:
                        if name not in processes:
                            task = self.prepare(name, samples, number, Path(temporary) / f"{name}-{number}")
                            processes[name] = stack.enter_context(started(task, self.args.threads))
                        row = {"run": run_id, "busy": self.args.busy, **processes[name].step()}
                    except RunError as error:
                        self.failures[name] = str(error)
                        print(f"{self.shape} {self.mode} {name}: failed: {error}", flush=True)
                        continue
                    if is_lone:
                        processes.pop(name).stop()
                    self.show(name, number, row)
                    self.contenders[name]["rounds"].append(row)
                self.save()
        self.show_summaries()
        return not self.failures

    def prepare(self, name: str, samples: Samples, start: int, folder: Path) -> Task:
        """Write the samples of a process that begins at round ``start``; return its task."""
        contender = CONTENDERS[name]
        samples.write(contender.order, start, folder)
        batch, accumulation = 2, STEP_SAMPLES // 2
        if contender.packed:
            tokens = STEP_SAMPLES * statistics.fmean(samples.lengths)
            batch, accumulation = 1, max(1, round(tokens / MAX_LENGTH))
        output = str(folder / "output")
        return Task(name, self.mode, str(self.model), str(folder), output, batch, accumulation, seed=start)

    def show(self, name: str, number: int, row: Row) -> None:
        rate, memory = row["real_tokens"] / row["seconds"], row["memory_mib"]
        figures = f"{row['seconds']:8.2f} s {rate:8.0f} real tokens/s {memory:6.0f} MiB"
        others = f"  others use {row['others_cpus']:.2f} CPUs" if row["others_cpus"] > MOST_OTHERS else ""
        print(f"{self.shape:<5} {self.mode:<15} round {number + 1} {name:<12}{figures}{others}", flush=True)

    def show_summaries(self) -> None:
        """Print the summaries as a table in Markdown."""
        columns = {
            "seconds_per_step": "s per step", "samples_per_second": "samples/s",
            "trained_tokens_per_second": "trained tokens/s", "real_tokens_per_second": "real tokens/s",
            "positions_per_real_token": "positions per real token", "memory_mib": "memory, MiB",
            "speed_to_best_other": "speed, best other = 1", "speed_to_best_float32": "speed, best other in float32 = 1",
            f"memory_to_{BASELINE}": f"memory, {BASELINE} = 1",
        }  # fmt: skip
        print(f"\n{self.shape}, {self.mode}:\n\n| | {' | '.join(columns.values())} |\n|{'---|' * (len(columns) + 1)}")
        for name, row in self.contenders.items():
            if values := row.get("summary"):
                print(f"| {name} | {' | '.join(str(values.get(key, '')) for key in columns)} |", flush=True)
        print(flush=True)

    def save(self) -> None:
        """Write all results so far, with the summaries of this shape and mode."""
        measured = {name: row for name, row in self.contenders.items() if row["rounds"]}
        for row in measured.values():
            row["summary"] = summary(row["rounds"])
        add_ratios({name: row["summary"] for name, row in measured.items()})
        entry = {"failed": self.failures, "contenders": measured}
        self.file["results"].setdefault(self.shape, {})[self.mode] = entry
        about = {
            "command": "python -m benchmarks.step", "machine": machine(self.args.threads),
            "settings": settings(self.args.data_path),
        }  # fmt: skip
        save_results({**about, "results": self.file["results"]}, self.args.output)


def summary(rounds: Sequence[Row]) -> Row:
    """Return the medians over rounds; positions per real token is the ratio of the sums."""

    def median(value: Any, digits: int) -> float:
        return round(statistics.median(value(row) for row in rounds), digits)

    return {
        "rounds": len(rounds),
        "seconds_per_step": median(lambda row: row["seconds"], 4),
        "cpu_seconds_per_step": median(lambda row: row["cpu_seconds"], 4),
        "samples_per_second": median(lambda row: row["samples"] / row["seconds"], 3),
        "trained_tokens_per_second": median(lambda row: row["trained_tokens"] / row["seconds"], 1),
        "real_tokens_per_second": median(lambda row: row["real_tokens"] / row["seconds"], 1),
        "positions_per_real_token": round(
            sum(row["positions"] for row in rounds) / sum(row["real_tokens"] for row in rounds), 3
        ),
        "memory_mib": round(max(row["memory_mib"] for row in rounds)),
        "others_cpus": max(row["others_cpus"] for row in rounds),
        "busy": any(row["busy"] for row in rounds),
    }


def add_ratios(summaries: Mapping[str, Row]) -> None:
    """Add the speed beside the fastest contender of each precision that is not ours, the memory beside HF's flat rows.

    A contender in bfloat16 is compared with both precisions, one in float32 with its own.
    """
    best: dict[bool, float] = {}
    for name, row in summaries.items():
        contender = CONTENDERS[name]
        if contender.kind != "ours":
            best[contender.bf16] = max(best.get(contender.bf16, 0), row["real_tokens_per_second"])
    for name, row in summaries.items():
        is_bf16 = CONTENDERS[name].bf16
        for column, precision in (("speed_to_best_other", is_bf16), ("speed_to_best_float32", False)):
            if precision in best and (is_bf16 or column == "speed_to_best_other"):
                row[column] = round(row["real_tokens_per_second"] / best[precision], 3)
        if BASELINE in summaries:
            row[f"memory_to_{BASELINE}"] = round(row["memory_mib"] / summaries[BASELINE]["memory_mib"], 3)


# ----------------------------------------------------------------------------------------------------------- processes


class Process:
    """A contender that has done its first step and waits for the next round."""

    def __init__(self, task: Task, process: subprocess.Popen[str], stderr: Any) -> None:
        self.task, self.process, self.stderr = task, process, stderr
        self._read()
        self.floor = anonymous_memory(process.pid)
        self._send()
        self._read()

    def step(self) -> Row:
        """Do one optimizer step; return its counts, seconds, peak memory and the CPUs that others used."""
        peak, done = [0.0], threading.Event()

        def watch() -> None:
            while not done.wait(0.005):
                peak[0] = max(peak[0], anonymous_memory(self.process.pid))

        watcher = threading.Thread(target=watch)
        row: Row = {}

        def work() -> float:
            self._send()
            row.update(json.loads(self._read()))
            return float(row["cpu_seconds"])

        watcher.start()
        try:
            others = others_during(work)
        finally:
            done.set()
            watcher.join()
        times = {name: round(row[name], 4) for name in ("seconds", "cpu_seconds")}
        return {**row, **times, "memory_mib": round(peak[0] - self.floor), "others_cpus": round(others, 3)}

    def stop(self) -> None:
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.communicate()  # the end of its input ends it
        self.process.wait()

    def _send(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: reading says why
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def _read(self) -> str:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return line
        self.process.wait()
        self.stderr.seek(0)
        last = (self.stderr.read().strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{self.task.name} ended with exit code {self.process.returncode}: {last}", "See its message")


@contextmanager
def started(task: Task, threads: int) -> Iterator[Process]:
    """Start a contender and let it do its first step; end it at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "benchmarks.step_contenders", task.to_json()]
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True
        )
        try:
            contender = Process(task, process, stderr)
            yield contender
            contender.stop()
        finally:
            process.kill()
            process.communicate()


def others_during(work: Any) -> float:
    """Return the CPUs that other processes use while ``work`` runs, which returns the CPU seconds of its process."""

    def busy() -> float:
        user, nice, system, _, _, interrupts, soft, steal = (
            int(word) for word in Path("/proc/stat").read_text().split()[1:9]
        )
        ticks = user + nice + system + interrupts + soft + steal
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()

    before, started_at = busy(), time.perf_counter()
    used = work() or 0.0
    return float(max(0.0, busy() - before - used) / (time.perf_counter() - started_at))


def check_others(cpus: float) -> None:
    """Raise ``ConfigError`` if others use the machine."""
    if cpus > MOST_OTHERS:
        what = f"other processes use {cpus:.2f} of {os.cpu_count()} CPUs, so times would not be comparable"
        raise ConfigError(what, "Wait until they end (--add continues after the rounds that are saved), or give --busy")


def settings(data: Path) -> Row:
    return {
        "data": data.name, "model_max_length": MAX_LENGTH, "samples_per_step": STEP_SAMPLES, "dtype": "float32",
        "shapes": SHAPES,
    }  # fmt: skip


def machine(threads: int) -> Row:
    packages = ("torch", "transformers", "peft", "accelerate", "trl")
    installed = {name: version(name) for name in packages if importlib.util.find_spec(name) is not None}
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return {"cpu": model, "threads": threads, "python": platform.python_version(), **installed}


if __name__ == "__main__":
    run_command(main, "benchmarks.step")
