"""Held-out perplexity, time and memory of quantising to 4 bits, by this revision and by an earlier one.

    python -m benchmarks.quantize --model_name_or_path DIR --data_path FILE [--before REVISION] [--output FILE]

Calibration and held-out conversations are drawn from the data with a fixed seed, and are the same for all rows. Each
run quantises in groups of 64 in a process of its own, with the sources of its revision (an archive of the repository),
and includes what that revision measures. Seconds are those of all threads on the CPU; memory is the peak of RssAnon
above its value after the imports. The perplexity is measured afterwards, from the written files. The second model is a
tiny one that is trained on the data.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.loss import anonymous_memory
from benchmarks.results_file import parse_args, save_results
from commands import HelpFormatter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quantize.json"
GROUP_SIZE, THREADS, SEED, MAX_LENGTH = 64, 2, 42, 512
FORMATS = ("gptq", "awq")
# The last revision with symmetric GPTQ and with AWQ's own search.
BEFORE = "f91ef3c"
TINY_SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 512, "num_attention_heads": 4}
TINY_STEPS = 150

QUANTIZE = """
import json, sys, time
from pathlib import Path
import torch, transformers
from checkpoints.model_config import Quantization
from loading.checkpoint import load_checkpoint
from quantize.calibration import Samples
from quantize.checkpoint import quantize_checkpoint
model, format_, group_size, samples, output, result, *options = sys.argv[1:]
samples = Samples(**json.loads(Path(samples).read_text()))
options = dict.fromkeys(options, True)  # an earlier revision has none
quantization = Quantization(format_, 4, int(group_size), zero_offset=int(format_ == "gptq"), **options)
print("ready", flush=True)
sys.stdin.readline()
started = time.process_time()
measured = quantize_checkpoint(load_checkpoint(model), quantization, samples, Path(output))
seconds, nearest = time.process_time() - started, getattr(measured, "nearest", None)
worst = getattr(measured, "worst_layer", None)
worst = worst and {"worst_layer": worst, "worst_layer_error": round(measured.errors[worst], 4)}
Path(result).write_text(json.dumps([seconds, nearest and [nearest.sums, nearest.counts], worst]))
"""
MEASURE = """
import json, sys
from pathlib import Path
import torch
from loading.checkpoint import load_checkpoint, load_model
from quantize.checkpoint import measure_losses
model, samples, result = sys.argv[1:]
held_out = json.loads(Path(samples).read_text())["held_out"]
losses = measure_losses(load_model(load_checkpoint(model), torch.float32), held_out, torch.device("cpu"))
Path(result).write_text(json.dumps([losses.sums, losses.counts]))
"""


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantize", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True, help="pretrained checkpoint")
    parser.add_argument(
        "--data_path", required=True, help="conversations to calibrate, to measure and for the tiny model"
    )
    parser.add_argument("--samples", type=int, default=32, help="conversations that calibrate")
    parser.add_argument("--before", default=BEFORE, help="revision to compare with; default: %(default)s")
    args = parse_args(parser, argv, RESULTS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        check_out(args.before, folder / "before")
        rows = compare("pretrained", args.model_name_or_path, args, folder / "pretrained")
        rows += compare("tiny", str(train_tiny(args.data_path, folder)), args, folder / "tiny")
    command = f"python -m benchmarks.quantize --model_name_or_path DIR --data_path {Path(args.data_path).name}"
    settings = {"samples": args.samples, "bits": 4, "group_size": GROUP_SIZE, "before": args.before}
    save_results({"command": command, "machine": machine(), **settings, "rows": rows}, args.output)


def check_out(revision: str, folder: Path) -> None:
    """Write the sources of a revision to a folder."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)


def train_tiny(data: str, folder: Path) -> Path:
    """Train all parameters of a tiny Qwen v1 on the data; return the folder of the result."""
    shape = [word for name, value in TINY_SHAPE.items() for word in (f"--{name}", str(value))]
    run("-m", "scripts.make_tiny_qwen", "--output", folder / "tiny-base", *shape)
    run(
        "finetune.py", "--model_name_or_path", folder / "tiny-base", "--data_path", data,
        "--output_dir", folder / "tiny-trained", "--max_steps", TINY_STEPS, "--per_device_train_batch_size", 8,
        "--gradient_accumulation_steps", 1, "--learning_rate", 3e-3, "--model_max_length", MAX_LENGTH,
        "--save_strategy", "no",
    )  # fmt: skip
    return folder / "tiny-trained"


def compare(name: str, model: str, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Quantise a model with both revisions in both formats; return a row for each, and for rounding to nearest."""
    from quantize.perplexity import AnswerLosses

    folder.mkdir()
    samples = folder / "samples.json"
    counts = draw(model, args.data_path, args.samples, samples)
    losses: dict[str, AnswerLosses] = {"float": measure_losses(model, samples)}
    costs: dict[str, dict[str, Any]] = {}
    before = folder.parent / "before"
    for format_ in FORMATS:
        runs: list[tuple[str, Path, list[str]]] = [("before", before, []), ("now", ROOT, [])]
        for when, sources, options in [*runs, *([("symmetric", ROOT, ["symmetric"])] if format_ == "gptq" else [])]:
            row, output = f"{format_} {when}", folder / f"{format_}-{when}"
            result = folder / "result.json"
            memory = run_and_watch(sources, [model, format_, GROUP_SIZE, samples, output, result, *options])
            losses[row] = measure_losses(output, samples)
            seconds, nearest, worst = json.loads(result.read_text())
            costs[row] = {"cpu_seconds": round(seconds, 1), "memory_mib": memory, **(worst or {})}
            if when != "before":
                costs[row]["time_to_before"] = round(seconds / costs[f"{format_} before"]["cpu_seconds"], 2)
            if nearest is not None and not options:
                losses["nearest"] = AnswerLosses(*map(tuple, nearest))
    rows = []
    for row, measured in losses.items():
        figures = {"perplexity": round(measured.perplexity, 4)}
        if row != "float":
            figures |= {key: round(value, 4) for key, value in measured.change_from(losses["float"])._asdict().items()}
        rows.append({"model": name, "weights": row, **figures, **costs.get(row, counts if row == "float" else {})})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def draw(model: str, data: str, count: int, target: Path) -> dict[str, int]:
    """Write the calibration and held-out samples as JSON; return their sizes."""
    from data_utils.encode import EncodeOptions
    from loading.checkpoint import load_checkpoint
    from quantize.calibration import draw_samples

    options = EncodeOptions(max_length=MAX_LENGTH)
    samples = draw_samples(load_checkpoint(model), [data], count, options, "auto", SEED, show_progress=False)
    lists = {
        name: [{key: list(map(int, each[key])) for key in ("input_ids", "labels")} for each in examples]
        for name, examples in (("calibration", samples.calibration), ("held_out", samples.held_out))
    }
    target.write_text(json.dumps(lists))
    return {
        "calibration_tokens": samples.calibration_tokens,
        "held_out_conversations": len(samples.held_out),
        "held_out_answer_tokens": samples.held_out_tokens,
    }


def measure_losses(model: str | Path, samples: Path) -> Any:
    """Return the ``AnswerLosses`` of a checkpoint, from a process of its own."""
    from quantize.perplexity import AnswerLosses

    result = samples.with_name("losses.json")
    run("-c", MEASURE, model, samples, result)
    return AnswerLosses(*map(tuple, json.loads(result.read_text())))


def run(*arguments: object) -> None:
    command = [sys.executable, *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, env=environment(), stdout=subprocess.DEVNULL)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "passive"}


def run_and_watch(sources: Path, arguments: Sequence[object]) -> int:
    """Quantise with the sources of a revision; return the peak of anonymous memory above that of the imports (MiB)."""
    command = [sys.executable, "-c", QUANTIZE, *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=sources, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    while process.stdout.readline() not in ("ready\n", ""):  # libraries may print first
        pass
    floor = peak = anonymous_memory(process.pid)
    process.stdin.write("\n")
    process.stdin.flush()
    while process.poll() is None:
        peak = max(peak, anonymous_memory(process.pid))
        time.sleep(0.02)
    if process.returncode != 0:
        raise RuntimeError(f"quantising with the sources in {sources} failed")
    return round(peak - floor)


def machine() -> dict[str, Any]:
    device = f"{platform.processor() or platform.machine()}, {THREADS} threads"
    return {"device": device, **{name: version(name) for name in ("torch", "transformers", "safetensors")}}


if __name__ == "__main__":
    main(sys.argv[1:])
