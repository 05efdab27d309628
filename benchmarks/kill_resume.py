"""Kill runs again and again, and compare the result with an uninterrupted run.

    python -m benchmarks.kill_resume [--short] [--modes one packed ddp ...] [--seed 7] [--output FILE]

A run of 60 steps trains a LoRA adapter for a tiny Qwen v1 on two sources, with dropout and accumulation, and evaluates
and saves every other step. A second run gets SIGKILL at moments drawn from a seed: while it loads, in a step, in an
evaluation, in the middle of saving. The same command starts it again each time (--resume_from_checkpoint auto). At the
end the weights, every row of the log and the checkpoints of both runs must be bit-identical.

The phase of a run is observed from outside: by its log, and by the hidden folder where a checkpoint is staged. A kill
during training comes after at least one checkpoint more than the kill before it left; kills while the run loads come in
between, at any time. With several processes one of them is killed, or all with their launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.results_file import parse_args, save_results
from checkpoints.names import ADAPTER_SAFETENSORS, TRAINING_LOG
from commands import HelpFormatter
from training.run_folder.names import STAGING

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kill_resume.json"
MODEL = ROOT / "tests" / "references" / "qwen_v1_small" / "tiny-qwen-small"
STEPS, SHORT_STEPS, EVERY = 60, 24, 2
PHASES = ("loading", "step", "evaluation", "saving")
MODES: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "packed": (1, ["--packing", "--model_max_length", "256", "--dataloader_num_workers", "1"]),
    "ddp": (2, []),
    "packed_ddp": (2, ["--packing", "--model_max_length", "256"]),
    "zero2": (2, ["--deepspeed", str(ROOT / "finetune" / "ds_config_zero2.json")]),
    "zero3": (2, ["--deepspeed", str(ROOT / "finetune" / "ds_config_zero3.json")]),
}
KILLS = {"one": 30}
KILLS_OF_OTHER_MODES, SHORT_KILLS = 10, 4
TIMEOUT = 180.0


@dataclass
class Kill:
    """A kill: phase that was aimed at and phase that was hit, rank or all, last step and checkpoint that remain."""

    phase: str
    hit: str
    whom: str
    step: int
    checkpoint: int


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kill_resume", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--short", action="store_true", help=f"4 kills of one process, in {SHORT_STEPS} steps")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seed", type=int, default=7)
    args = parse_args(parser, argv, RESULTS)
    modes = ["one"] if args.short else args.modes
    all_identical = True
    for mode in modes:
        kills = SHORT_KILLS if args.short else KILLS.get(mode, KILLS_OF_OTHER_MODES)
        steps = SHORT_STEPS if args.short else STEPS
        with tempfile.TemporaryDirectory() as folder:
            row = compare(Path(folder), mode, kills, steps, args.seed)
        print(describe(row), flush=True)
        save_row({"command": command_of(args, mode), **row}, args.output)
        all_identical &= row["identical"]
    if not all_identical:
        sys.exit(1)


def command_of(args: argparse.Namespace, mode: str) -> str:
    """Return the command that measures the row of a mode."""
    return f"python -m benchmarks.kill_resume {'--short' if args.short else f'--modes {mode}'} --seed {args.seed}"


def save_row(row: dict[str, Any], path: Path) -> None:
    """Write the row of a mode; rows of other modes, which may have been measured before, stay."""
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [*(other for other in earlier if other["mode"] != row["mode"]), row]
    result = {"machine": f"{platform.machine()}, {os.cpu_count()} CPUs", "rows": rows}
    save_results(result, path)


def describe(row: dict[str, Any]) -> str:
    hit = Counter(kill["hit"] for kill in row["kills"])
    phases = ", ".join(f"{count} in {phase}" for phase, count in hit.items())
    whom = Counter(kill["whom"] for kill in row["kills"])
    verdict = "bit-identical" if row["identical"] else "DIFFERENT: " + ", ".join(row["differing"])
    return (
        f"{row['mode']:<10} {row['processes']} processes, {len(row['kills'])} kills ({phases}; of {dict(whom)}), "
        f"{row['resumed']} of {row['starts']} starts resumed, {row['seconds']:.0f} s: {verdict}"
    )


def compare(folder: Path, mode: str, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Train without and with kills, and compare."""
    write_data(folder)
    started, draw = time.monotonic(), random.Random(f"{seed} {mode}")
    uninterrupted = Run(folder, "uninterrupted", mode, steps)
    seconds_to_load = uninterrupted.finish()
    run = Run(folder, "killed", mode, steps)
    done = []
    phases = [PHASES[number % len(PHASES)] for number in range(kills)]
    draw.shuffle(phases)
    for number, phase in enumerate(phases):
        remaining = sum(phase != "loading" for phase in phases[number:])
        done.append(run.kill(phase, draw, remaining, seconds_to_load))
        print(f"  {number + 1}: {done[-1]}", file=sys.stderr, flush=True)
    run.finish()
    differing = [
        name for name, read in (("weights", weights_of), ("log", log_of), ("checkpoint", checkpoints_of))
        if read(run.output) != read(uninterrupted.output)
    ]  # fmt: skip
    return {
        "mode": mode,
        "processes": MODES[mode][0],
        "steps": steps,
        "kills": [asdict(kill) for kill in done],
        "starts": run.starts,
        "resumed": run.resumed,
        "seconds": round(time.monotonic() - started, 1),
        "identical": not differing,
        "differing": differing,
        "weights": weights_of(run.output),
    }


def write_data(folder: Path) -> None:
    draw = random.Random(3)
    words = "water light stone river seven green above never small music winter bread".split()
    for name, size in (("a", 60), ("b", 24), ("eval", 24)):
        records = []
        for _ in range(size):
            question, answer = (" ".join(draw.choices(words, k=draw.randint(2, 30))) for _ in range(2))
            turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
            records.append({"conversations": turns})
        (folder / f"{name}.json").write_text(json.dumps(records))


class Run:
    """A command that is started again until it succeeds."""

    def __init__(self, folder: Path, name: str, mode: str, steps: int) -> None:
        self.steps = steps
        self.output, self.errors = folder / name, folder / f"{name}.txt"
        self.processes, flags = MODES[mode]
        self.starts = self.resumed = 0
        self.command = [
            "finetune.py", "--model_name_or_path", MODEL, "--data_path", folder / "a.json", folder / "b.json",
            "--eval_data_path", folder / "eval.json", "--output_dir", self.output, "--use_lora", "--lora_dropout", 0.1,
            "--learning_rate", 1e-3, "--max_steps", steps, "--per_device_train_batch_size", 2,
            "--gradient_accumulation_steps", 2, "--per_device_eval_batch_size", 1, "--logging_steps", 1,
            "--eval_strategy", "steps", "--eval_steps", EVERY, "--save_strategy", "steps", "--save_steps", EVERY,
            "--save_total_limit", 3, "--disable_tqdm", "True", "--use_cpu", "True", "--resume_from_checkpoint", "auto",
            *flags,
        ]  # fmt: skip

    def start(self) -> subprocess.Popen[bytes]:
        launcher: list[object] = []
        if self.processes > 1:
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                port = listener.getsockname()[1]
            launcher = ["-m", "torch.distributed.run", "--nproc_per_node", self.processes, "--master_port", port]
        self.starts += 1
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
        with self.errors.open("wb") as errors:
            words = [os.environ.get("PYTHON_EXEC", sys.executable), *map(str, launcher), *map(str, self.command)]
            return subprocess.Popen(words, cwd=ROOT, env=environment, stderr=errors, start_new_session=True)

    def finish(self) -> float:
        """Run it to its end; return how many seconds it loaded."""
        process, started = self.start(), time.monotonic()
        try:
            while not self.is_loaded() and process.poll() is None:
                time.sleep(0.01)
            seconds = time.monotonic() - started
            code = process.wait(TIMEOUT)
        finally:
            end(process)
        self.count_start()
        if code:
            raise SystemExit(f"exit code {code}\n{self.errors.read_text()}")
        return seconds

    def count_start(self) -> None:
        self.resumed += "Resuming from" in self.errors.read_text()

    def kill(self, phase: str, draw: random.Random, remaining: int, seconds_to_load: float) -> Kill:
        """Start the run, and kill it in a phase.

        Args:
            remaining: number of kills during training that are still to come, this one included.
            seconds_to_load: time to the first step.
        """
        before = self.newest_checkpoint()
        process = self.start()
        whom = "all" if self.processes == 1 or draw.random() < 0.5 else f"rank {draw.randrange(self.processes)}"
        delay = draw.random()
        if phase == "loading":
            deadline = time.monotonic() + delay * seconds_to_load
            while self.processes > 1 and len(children_of(process.pid)) < self.processes:
                time.sleep(0.01)
            while time.monotonic() < deadline and not self.is_loaded():
                time.sleep(0.01)
        else:
            is_in_phase: Callable[[], bool] = {
                "step": self.is_in_step, "evaluation": self.is_evaluating, "saving": self.is_saving,
            }[phase]  # fmt: skip
            spare = max(0, (self.steps - before) // EVERY - 1 - remaining)  # checkpoints that later kills do not need
            target = before + EVERY * (1 + draw.randint(0, min(spare, 2 * spare // remaining)))
            deadline = time.monotonic() + TIMEOUT
            while not (self.newest_checkpoint() >= target and is_in_phase()):
                if process.poll() is not None or time.monotonic() > deadline:
                    end(process)
                    raise SystemExit(
                        f"the run ended before it was killed: exit code {process.poll()}\n{self.errors.read_text()}"
                    )
                time.sleep(0.002)
            time.sleep(0.02 * delay)
        if whom == "all":
            end(process)
        else:
            kill_rank(process.pid, int(whom.split()[1]))
            try:
                process.wait(TIMEOUT)
            finally:
                end(process)
        self.count_start()
        return Kill(phase, self.observed_phase(), whom, self.newest_step(), self.newest_checkpoint())

    # ------------------------------------------------------------------------------------------ observed from outside

    def newest_checkpoint(self) -> int:
        steps = [int(path.name.partition("-")[2]) for path in self.output.glob("checkpoint-*")]
        return max(steps, default=0)

    def rows(self) -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            lines = (self.output / TRAINING_LOG).read_text().splitlines()
            with contextlib.suppress(ValueError):
                return [json.loads(line) for line in lines]
        return []

    def newest_step(self) -> int:
        return max((row["step"] for row in self.rows()), default=0)

    def observed_phase(self) -> str:
        """Return the phase in which the run was killed."""
        if not self.is_loaded():
            return "loading"
        return "saving" if self.is_saving() else "evaluation" if self.is_evaluating() else "step"

    def is_loaded(self) -> bool:
        return "Fine-tuning" in self.errors.read_text()

    def is_in_step(self) -> bool:
        """Return whether the last logged step is one after which neither evaluation nor saving is due."""
        rows = self.rows()
        return bool(rows) and rows[-1]["step"] % EVERY != 0

    def is_evaluating(self) -> bool:
        rows = self.rows()
        return bool(rows) and rows[-1]["step"] % EVERY == 0 and "loss" in rows[-1]

    def is_saving(self) -> bool:
        return any((self.output / STAGING).glob("checkpoint-*"))


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children."""
    children = [] if process.poll() is not None else children_of(process.pid)
    process.kill()
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    process.wait()


def kill_rank(launcher: int, rank: int) -> None:
    """Kill the process of a rank, which its environment shows."""
    for child in children_of(launcher):
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            os.kill(child, signal.SIGKILL)
            return
    raise SystemExit(f"there is no process of rank {rank}")


def children_of(parent: int) -> list[int]:
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                children.append(int(folder.name))
    return children


# -------------------------------------------------------------------------------------------------- compared files


def weights_of(output: Path) -> str:
    return hashlib.sha256((output / ADAPTER_SAFETENSORS).read_bytes()).hexdigest()


def log_of(output: Path) -> list[dict[str, Any]]:
    """Return the rows of the log without times and memory."""
    rows = [json.loads(line) for line in (output / TRAINING_LOG).read_text().splitlines()]
    timed = ("elapsed", "tokens_per_second", "peak_memory_gib", "eta_seconds")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def checkpoints_of(output: Path) -> list[str]:
    """Return name and weights of each remaining checkpoint."""
    return [f"{folder.name} {weights_of(folder)}" for folder in sorted(output.glob("checkpoint-*"))]


if __name__ == "__main__":
    main(sys.argv[1:])
