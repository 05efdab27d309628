"""Measure time and memory of data previews: memory must not grow with the number of records.

    python -m benchmarks.data

Writes 1,000, 10,000 and 100,000 generated conversations as .jsonl, .json, .jsonl.gz and .parquet to a temporary folder
and previews each file in a separate process. Peak resident memory (including imported libraries) and seconds are
written to benchmarks/results/data.json.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.results_file import parse_args, save_results
from commands import HelpFormatter

ROOT = Path(__file__).parents[1]
SIZES = (1_000, 10_000, 100_000)
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet")


def conversations(count: int) -> Iterator[dict[str, Any]]:
    """Yield conversations of one to three exchanges of sentences from ``examples/``, numbered so that all differ."""
    random = Random(0)
    records = json.loads((ROOT / "examples" / "identity.json").read_text(encoding="utf-8"))
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    for number in range(count):
        turns = []
        for _ in range(random.randint(1, 3)):
            turns.append({"from": "user", "value": f"{number}: {' '.join(random.choices(texts, k=5))}"})
            turns.append({"from": "assistant", "value": " ".join(random.choices(texts, k=20))})
        yield {"id": str(number), "conversations": turns}


def write(path: Path, count: int) -> None:
    records = conversations(count)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.Table.from_pylist(list(conversations(1))).schema
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            while rows := list(itertools.islice(records, 10_000)):
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
        return
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as file:
        if path.suffix == ".json":
            file.write(f"[{next(lines)}")
            file.writelines(f",\n{line}" for line in lines)
            file.write("]")
        else:
            file.writelines(f"{line}\n" for line in lines)


def preview(model: Path, data: Path) -> dict[str, float]:
    """Return seconds and peak memory of a preview, measured from outside, and its counts."""
    figures = data.with_name("figures.json")
    command = ["-m", "scripts.preview_data", "--model_name_or_path", model, "--data_path", data, "--json", figures]
    started, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(
        [sys.executable, *map(str, command), "--disable_tqdm", "True"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None:
        peak = max(peak, peak_memory(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    assert process.returncode == 0, f"the preview of {data} failed with exit code {process.returncode}"
    report = json.loads(figures.read_text(encoding="utf-8"))["train"]
    return {
        "records": report["read"],
        "file_mib": round(data.stat().st_size / 2**20, 1),
        "tokens": report["tokens"],
        "seconds": round(seconds, 2),
        "peak_mib": round(peak, 1),
    }


def peak_memory(pid: int) -> float:
    """Return the peak resident memory of a process in MiB (Linux only).

    ``ru_maxrss`` of children would include the memory of this process, copied when it forks.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(match[1]) / 2**10 if match else 0.0


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--records", type=int, nargs="+", default=list(SIZES))
    args = parse_args(parser, argv, ROOT / "benchmarks" / "results" / "data.json")
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        subprocess.run([sys.executable, "-m", "scripts.make_tiny_qwen", "--output", str(model)], cwd=ROOT, check=True)
        for suffix in SUFFIXES:
            for count in args.records:
                data = Path(name) / f"data{suffix}"
                write(data, count)
                result = preview(model, data)
                results.setdefault(suffix, []).append(result)
                print(f"{suffix:10}" + "".join(f"{value:>12,} {key}" for key, value in result.items()), flush=True)
    growth = {suffix: round(rows[-1]["peak_mib"] - rows[0]["peak_mib"], 1) for suffix, rows in results.items()}
    print(f"memory growth from the smallest to the largest file, MiB: {growth}")
    summary = {
        "command": "python -m benchmarks.data",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "tiktoken", "pyarrow")},
        "growth_mib": growth,
        "previews": results,
    }
    save_results(summary, args.output)


if __name__ == "__main__":
    main(sys.argv[1:])
