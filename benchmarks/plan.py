"""Rehearsed memory beside measured memory of short runs, and beside the published figures of the original.

    python -m benchmarks.plan [--shapes tiny small middle] [--modes full lora ...] [--lengths 256 1024]
    python -m benchmarks.plan --grid [--sizes 7B ...] [--modes ...] [--lengths ...]

The first form calibrates: it writes random models (Qwen2, 151,936 rows, float32), and for each mode and length lets
finetune.py train three steps of one sample in a process of its own, and rehearses the same run from the same data. On a
CPU "measured" is the peak of the process's RssAnon above its value after the imports, with the pages of the checkpoint
that are mapped in the steps ("mapped": frozen weights of the stored type are not copied, and no part of RssAnon; at
most the size of the weights, because pages that were quantised stay until memory is needed). glibc returns freed memory
at once there; by default it keeps tens of MiB. On a GPU it is ``torch.cuda.max_memory_allocated``.

The second form rehearses the published sizes of Qwen v1 from their config.json, as they were measured for the original:
one sample per micro-batch, bfloat16, a GPU. It runs nothing, needs a minute or so for each model and length, and adds
to the results that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.loss import anonymous_memory
from benchmarks.results_file import parse_args, save_results
from commands import HelpFormatter

if TYPE_CHECKING:
    from planning.expectation import Expectation

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MIB = 2**20
THREADS, STEPS, GROUP = 2, 3, 64
TOKENIZER = ROOT / "tests" / "references" / "qwen_v1_small" / "tiny-qwen-small"
MIDDLE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = ("tiny", "small", "middle")
_LORA = ["--use_lora", "--trainable_embeddings", "none"]
MODES: dict[str, list[str]] = {
    "full": [],
    "lora": _LORA,
    "lora_embeddings": ["--use_lora", "--trainable_embeddings", "full"],
    "nf4": [*_LORA, "--q_lora"],
    "gptq": [*_LORA, "--q_lora"],
}
# glibc otherwise keeps tens of MiB of freed memory, which RssAnon counts.
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TOLERANCE, TOLERANCE_MIB, SMALL_MIB = 0.15, 64, 512


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--grid", action="store_true", help="rehearse the published sizes instead")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sizes", nargs="+", help="with --grid: published sizes (default: all)")
    parser.add_argument("--modes", nargs="+", help="modes (default: all)")
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of the sample (default: 256 1024, or all)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    if "--child" in argv:
        return run_child(parser.parse_args(argv).child)
    grid = "--grid" in argv
    args = parse_args(parser, argv, RESULTS / ("plan_grid.json" if grid else "plan.json"))
    if grid:
        from benchmarks.plan_grid import rehearse_grid

        return rehearse_grid(args)
    return calibrate(args)


# ----------------------------------------------------------------------------------------------------- calibration


def calibrate(args: argparse.Namespace) -> int:
    """Measure and rehearse every case; return 1 if one is outside of the tolerance."""
    rows: list[dict[str, Any]] = []
    modes, lengths = args.modes or list(MODES), args.lengths or [256, 1024]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder / "data.json", max(lengths))
        for shape in args.shapes:
            write_models(shape, folder / shape, folder / f"{shape}-gptq")
            for mode in modes:
                for length in lengths:
                    model = folder / (f"{shape}-gptq" if mode == "gptq" else shape)
                    flags = run_flags(model, folder, mode, length)
                    row = {"shape": shape, "mode": mode, "tokens": length, **compare(flags)}
                    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                    rows.append(row)
    record = {"command": "python -m benchmarks.plan", "machine": machine(), "rows": rows}
    save_results(record, args.output)
    print("\n".join(table(rows)))
    outside = [row for row in rows if not row["within"]]
    print(
        f"{len(rows) - len(outside)} of {len(rows)} within {TOLERANCE:.0%}, {TOLERANCE_MIB} MiB below {SMALL_MIB} MiB"
    )
    return 1 if outside else 0


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the results in Markdown: rehearsed and measured MiB, with their difference."""
    cases = sorted(
        {(row["mode"], row["tokens"]) for row in rows}, key=lambda case: (list(MODES).index(case[0]), case[1])
    )
    cells = {
        (row["shape"], row["mode"], row["tokens"]): (
            f"{row['rehearsed_mib']:,} / {row['measured_mib']:,} ({row['error']:+.0%})"
        )
        for row in rows
    }
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    lines = [f"| mode, tokens | {' | '.join(shapes)} |", "|---" * (len(shapes) + 1) + "|"]
    for mode, tokens in cases:
        values = (cells.get((shape, mode, tokens), "") for shape in shapes)
        lines.append(f"| {mode}, {tokens:,} | {' | '.join(values)} |")
    return lines


def run_flags(model: Path, folder: Path, mode: str, length: int) -> list[str]:
    """Return the flags of a short run."""
    return [
        "--model_name_or_path", str(model), "--data_path", str(folder / "data.json"), "--output_dir",
        str(folder / "output"), "--max_steps", str(STEPS), "--logging_steps", "1", "--per_device_train_batch_size",
        "1", "--gradient_accumulation_steps", "1", "--model_max_length", str(length), "--truncation", "cut",
        "--save_strategy", "no", "--report_to", "none", "--overwrite_output_dir", "--disable_tqdm", "True",
        "--no_data_cache", "--keep_samples", "0", *(["--bf16"] if has_gpu() else ["--use_cpu"]), *MODES[mode],
    ]  # fmt: skip


def compare(flags: list[str]) -> dict[str, Any]:
    """Measure a run and rehearse it."""
    started = time.perf_counter()
    measured, mapped = measure(flags)
    between = time.perf_counter()
    expected = rehearse_run(flags)
    rehearsed = expected.share.peak_bytes / MIB
    mapped = min(mapped, expected.rehearsal.resident["weights"] / MIB)
    measured += mapped
    error = rehearsed / measured - 1
    within = abs(rehearsed - measured) <= TOLERANCE_MIB if measured < SMALL_MIB else abs(error) <= TOLERANCE
    return {
        "rehearsed_mib": round(rehearsed),
        "measured_mib": round(measured),
        "mapped_mib": round(mapped),
        "error": round(error, 3),
        "within": within,
        "peak_at": expected.share.peak_at,
        "run_seconds": round(between - started, 1),
        "rehearsal_seconds": round(time.perf_counter() - between, 1),
    }


def rehearse_run(flags: list[str]) -> Expectation:
    """Return what ``scripts.plan`` finds out about a run."""
    from commands import set_up_logging
    from planning.batches import RunBatches
    from planning.devices import find_device
    from planning.expectation import Machine, Planner
    from planning.model import read_checkpoint
    from training.config.parsing import parse_args as parse_run_args

    set_up_logging()
    args = parse_run_args([*flags, "--plan"])
    device = find_device(None, not has_gpu())
    planner = Planner(
        Machine(device, device.memory_gib), int(read_checkpoint(args).config.hidden_size), RunBatches.of_run(args, 1)
    )
    return planner.expect(args)


def measure(flags: list[str]) -> tuple[float, float]:
    """Return the peak RssAnon in MiB of a run above its imports, or on a GPU what torch has allocated there.

    The second value is what was mapped from the checkpoint beside it.
    """
    model = flags[flags.index("--model_name_or_path") + 1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "passive", **RETURN_FREED}
    command = [sys.executable, "-m", "benchmarks.plan", "--child", json.dumps(flags)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        floor = peak = anonymous_memory(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        peak_time, samples = 0.0, [(0.0, 0.0)]
        while process.poll() is None:
            now = time.monotonic()
            if (size := anonymous_memory(process.pid)) > peak:
                peak, peak_time = size, now
            if now > samples[-1][0] + 0.3 and (size_mapped := mapped_memory(process.pid, model)) is not None:
                samples.append((now, size_mapped))
            time.sleep(0.003)
        mapped = min(samples, key=lambda sample: abs(sample[0] - peak_time))[1]
        if process.returncode != 0:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(flags)} failed:\n{errors.read()[-2000:]}")
        allocated = float(process.stdout.read().split()[-1])
    return (allocated, 0) if has_gpu() else (peak - floor, mapped)


def mapped_memory(pid: int, folder: str) -> float | None:
    """Return the unchanged resident MiB that a process maps from the files of a folder; ``None`` if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:
        return None
    total, counts = 0, False
    for line in lines:
        name, _, value = line.partition(" ")
        if not name.endswith(":"):
            counts = f" {folder}/" in line
        elif counts and name in ("Rss:", "Anonymous:"):  # what the process has changed is anonymous
            total += int(value.split()[0]) * (1 if name == "Rss:" else -1)
    return total / 1024 if lines else None


def run_child(words: str) -> int:
    """Import what a run imports, wait for the parent, train, and print what torch has allocated on a GPU, in MiB."""
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    import planning.at_start  # noqa: F401
    import training.build
    import training.data
    import training.model
    import training.summary  # noqa: F401
    from qwen_model.register import register_qwen

    register_qwen()
    torch.set_num_threads(THREADS)
    print("imported", file=reports)
    sys.stdin.readline()
    runpy.run_path(str(ROOT / "finetune.py"), run_name="finetune")["main"](json.loads(words))
    print(torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else 0, file=reports)
    return 0


# ----------------------------------------------------------------------------------------------------- models and data


def write_models(shape: str, folder: Path, packed: Path) -> None:
    """Write a random model of a shape, and the same with packed 4-bit weights as GPTQ has them."""
    from safetensors.torch import load_file, save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from benchmarks.qlora import pack
    from benchmarks.step_inputs import SHAPES as STEP_SHAPES
    from benchmarks.step_inputs import VOCABULARY, write_tokenizer

    sizes = MIDDLE if shape == "middle" else STEP_SHAPES[shape]
    config: Any = Qwen2Config(**sizes, vocab_size=VOCABULARY, max_position_embeddings=2048)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    write_tokenizer(TOKENIZER, folder)
    packed.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (packed / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    values |= {
        "dtype": "float16",
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": GROUP},
    }
    (packed / "config.json").write_text(json.dumps(values))
    weights = dict(pack(load_file(folder / "model.safetensors"), "gptq", 4, GROUP, ".layers."))
    save_file(weights, packed / "model.safetensors", metadata={"format": "pt"})


def write_data(file: Path, tokens: int) -> None:
    """Write conversations with answers of at least as many characters as ``tokens``, and so of as many tokens."""
    records = json.loads((ROOT / "examples" / "identity.json").read_text(encoding="utf-8"))
    text = " ".join(turn["value"] for record in records for turn in record["conversations"])
    text = (text + " ") * (4 * tokens // len(text) + 2)
    turns = [{"from": "user", "value": "Say it all."}, {"from": "assistant", "value": text[: 8 * tokens]}]
    file.write_text(json.dumps([{"conversations": turns}] * (2 * STEPS)))


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def machine() -> dict[str, Any]:
    from benchmarks.qlora import machine as machine_of_runs

    return machine_of_runs()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
