"""Measure how fast data is checked, tokenised and stored, beside the way of Qwen v1's original script.

    python -m benchmarks.preparation --model_name_or_path DIR [--only memory | speed]

Prepares 20,000 short conversations of random sentences that all differ: with the original's way (one record at a time,
each piece tokenised by itself, padded to the maximum), then as a run does, in one process and in two; each five times,
in turns.
With 200,000 records it compares one process with two and measures how long a run takes to open prepared data. Peak
memory is RssAnon above what is there after the imports, of a process that prepares --gigabytes of JSON lines. The
results are written to benchmarks/results/preparation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.results_file import parse_args, save_results
from commands import HelpFormatter

ROOT = Path(__file__).parents[1]
EXAMPLES = [ROOT / "examples" / f"{name}.json" for name in ("identity", "multi_turn", "system_prompts")]
MAX_LENGTH = 512
Measured = tuple[str, Any]
"""The name of some figures, and the figures."""

LIBRARIES = ("torch", "transformers", "tokenizers", "tiktoken")


def write(path: Path, files: Sequence[Path], records: int, sentences: int = 3, least_bytes: float = 0) -> None:
    """Write conversations of one exchange, numbered so that all differ, until there are enough records and bytes."""
    random, texts = Random(0), _sentences(files)
    with path.open("wb") as file:
        number = written = 0
        while number < records or written < least_bytes:
            question, answer = random.choice(texts), " ".join(random.choices(texts, k=sentences))
            turns = [{"from": "user", "value": f"{number}: {question}"}, {"from": "assistant", "value": answer}]
            record = json.dumps({"id": str(number), "conversations": turns}, ensure_ascii=False)
            written += file.write(f"{record}\n".encode())
            number += 1


def _sentences(files: Sequence[Path]) -> list[str]:
    """Return the different sentences of data files, lists of records of any format."""
    found: dict[str, None] = {}

    def add(value: object) -> None:
        if isinstance(value, str):
            found.update(dict.fromkeys(re.split(r"(?<=[.?!])\s+", value)))
        elif isinstance(value, (dict, list)):
            for item in value.values() if isinstance(value, dict) else value:
                add(item)

    for file in files:
        add(json.loads(file.read_text(encoding="utf-8")))
    return list(found)


def original_way(path: Path, tokenizer: Any) -> int:
    """Tokenise as the original script does, which trains answers and the frames of all turns; return the tokens."""
    import torch

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text).input_ids
        return ids

    start, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))
    tokens, newline, ignored = 0, ids_of("\n"), -100
    for line in path.open(encoding="utf-8"):
        turns = [{"from": "system", "value": "You are a helpful assistant."}, *json.loads(line)["conversations"]]
        ids: list[int] = []
        labels: list[int] = []
        for turn in turns:
            header = [start, *ids_of(turn["from"]), *newline]
            text = ids_of(turn["value"])
            ids += [*header, *text, end, *newline]
            shown = text if turn["from"] == "assistant" else [ignored] * len(text)
            labels += [start, *[ignored] * (len(header) - 1), *shown, end, *newline]
        tokens += len(ids)
        padding = MAX_LENGTH - len(ids)
        torch.tensor((ids + [end] * padding)[:MAX_LENGTH], dtype=torch.int)
        torch.tensor((labels + [ignored] * padding)[:MAX_LENGTH], dtype=torch.int)
    return tokens


class Case:
    """Data of one size, prepared in any of the ways."""

    def __init__(self, path: Path, checkpoint: Any) -> None:
        self.path, self.checkpoint = path, checkpoint

    def reader(self, processes: int) -> Any:
        from data_utils.dataset import DataReader
        from data_utils.encode import EncodeOptions, Encoder
        from data_utils.sources import parse_source

        checkpoint = self.checkpoint
        encoder = Encoder(checkpoint.tokenizer, checkpoint.family, EncodeOptions(max_length=MAX_LENGTH))
        sources = {"train": [parse_source(str(self.path))]}
        return DataReader(sources, encoder, max_samples=3, show_progress=False, processes=processes)

    def prepare(self, processes: int) -> int:
        """Prepare the data as a run without a cache does, and return its tokens."""
        from data_utils.prepared import load_examples

        return int(load_examples(self.reader(processes))["train"].report.total().tokens)

    def open_cached(self, cache: Path) -> int:
        """Open the data as a run with a cache does, and return its tokens."""
        from training.data_cache import find_or_prepare

        prepared = find_or_prepare(cache, self.reader(1), self.checkpoint)
        prepared.release()
        return int(prepared.sets["train"].report.total().tokens)


def timed(work: Callable[[], int]) -> tuple[float, float]:
    """Return seconds and thousands of tokens per second."""
    started = time.perf_counter()
    tokens = work()
    seconds = time.perf_counter() - started
    return seconds, tokens / seconds / 1000


def interleaved(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, float]]:
    """Return the median seconds and the speed of each way, measured in turns."""
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            figures[name].append(timed(work))
            print(f"{name:24} {figures[name][-1][0]:8.2f} s {figures[name][-1][1]:8.0f} thousand tokens/s", flush=True)
    return {
        name: {
            "seconds": round(statistics.median(seconds for seconds, _ in each), 3),
            "thousand_tokens_per_second": round(statistics.median(speed for _, speed in each), 1),
        }
        for name, each in figures.items()
    }


def memory_of(path: Path, model: str) -> dict[str, float]:
    """Prepare a file in a process of its own; return its size and the peak of its memory above the imports."""
    code = f"from benchmarks.preparation import *; prepare_and_print({str(path)!r}, {model!r})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    tokens, growth = ended.stdout.split()[-2:]
    figures = {"gigabytes": path.stat().st_size / 1e9, "million_tokens": int(tokens) / 1e6, "mib": float(growth)}
    return {name: round(value, 2) for name, value in figures.items()}


def prepare_and_print(path: str, model: str) -> None:
    """Print the number of tokens of a file, and by how many MiB this process has grown while it prepared them."""
    import training.data_cache  # noqa: F401  what a run imports
    from loading.checkpoint import load_checkpoint

    tokens: list[int] = []
    growth = peak_growth(lambda: tokens.append(Case(Path(path), load_checkpoint(model)).prepare(1)))
    print(tokens[0], growth)


def peak_growth(work: Callable[[], object]) -> float:
    """Return by how many MiB the anonymous memory of this process exceeds what it was before (Linux only)."""
    before, peak, ended = _anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        ended.set()
        watcher.join()
    return round(peak[0] - before, 1)


def _anonymous() -> float:
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(match[1]) / 2**10 if match else 0.0


def measure_memory(folder: Path, model: str, texts: Sequence[Path], gigabytes: Sequence[float]) -> Iterator[Measured]:
    rows = []
    for size in gigabytes:
        path = folder / "huge.jsonl"
        write(path, texts, 0, 10, size * 1e9)
        rows.append(memory_of(path, model))
        path.unlink()
    yield "memory_above_the_imports", rows


def measure_speed(folder: Path, model: str, texts: Sequence[Path], rounds: int) -> Iterator[Measured]:
    from loading.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(model)
    small, large = (Case(folder / f"{name}.jsonl", checkpoint) for name in ("small", "large"))
    write(small.path, texts, 20_000)
    ways: dict[str, Callable[[], int]] = {
        "the original's way": lambda: original_way(small.path, checkpoint.tokenizer),
        "one process": lambda: small.prepare(1),
        "two processes": lambda: small.prepare(2),
    }
    figures = interleaved(ways, rounds)
    first = figures["the original's way"]["thousand_tokens_per_second"]
    times = {name: round(each["thousand_tokens_per_second"] / first, 2) for name, each in figures.items()}
    yield "records_20000", {**figures, "times_the_original": times}
    write(large.path, texts, 200_000)
    figures = interleaved({"one process": lambda: large.prepare(1), "two processes": lambda: large.prepare(2)}, 1)
    share = figures["two processes"]["seconds"] / figures["one process"]["seconds"]
    large.open_cached(folder / "cache")
    opened = interleaved({"prepared before": lambda: large.open_cached(folder / "cache")}, rounds)
    yield "records_200000", {**figures, **opened, "share_of_two": round(share, 3)}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preparation", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True, help="a checkpoint with a real vocabulary")
    parser.add_argument("--texts", type=Path, nargs="+", default=[*EXAMPLES], help="data files with the sentences")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.25, 1.0], help="of JSON lines, for the memory")
    parser.add_argument("--only", choices=("memory", "speed"), help="what to measure; the other figures stay")
    args = parse_args(parser, argv, ROOT / "benchmarks" / "results" / "preparation.json")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for each process
    summary: dict[str, Any] = json.loads(args.output.read_text()) if args.only and args.output.is_file() else {}
    summary |= {
        "commands": summary.get("commands", {}),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {name: version(name) for name in LIBRARIES},
    }
    with tempfile.TemporaryDirectory() as name:
        common = (Path(name), args.model_name_or_path, args.texts)
        memory = () if args.only == "speed" else measure_memory(*common, args.gigabytes)
        speed = () if args.only == "memory" else measure_speed(*common, args.rounds)
        for key, value in chain(memory, speed):
            summary[key] = value
            words = (Path(word).name if os.path.isabs(word) else word for word in argv)  # not this machine's folders
            summary["commands"][key] = f"python -m benchmarks.preparation {' '.join(words)}"
            print(key, json.dumps(value), flush=True)
    save_results(summary, args.output)


if __name__ == "__main__":
    main(sys.argv[1:])
