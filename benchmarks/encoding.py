"""Measure how fast each chat format reads, renders and encodes data, and how fast an older checkout does.

    python -m benchmarks.encoding --model_name_or_path DIR --templates DIR --texts FILE [FILE ...] [--other DIR ...]

The data are conversations of one and two exchanges made of Alpaca records, without thinking and with it. The tokenizers
are Qwen v1's, from --model_name_or_path, and the same vocabulary as tokenizer.json with the added tokens, the way of
splitting texts and the official chat template of each family. --other takes checkouts to compare with, made by
`git worktree add ../older COMMIT`. Each checkout has a process, which works when it is its turn: seconds are of CPU
time (one thread works), medians of interleaved rounds. Tokenizers are read before, and tiktoken's vocabularies are
built. Results: benchmarks/results/encoding.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results_file import parse_args, save_results
from commands import HelpFormatter

ROOT = Path(__file__).parents[1]
NEW = "this checkout"
WORDS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


class Case(NamedTuple):
    """What is measured: a chat format, its template's file, the data, and how samples are made."""

    name: str
    template: str
    data: str
    samples: str = "whole"


CASES = (
    Case("Qwen v1", "", "plain"),
    Case("Qwen2.5", "qwen2_5.jinja", "plain"),
    Case("Qwen3", "qwen3.jinja", "plain"),
    Case("Qwen3, thinking", "qwen3.jinja", "thoughts"),
    Case("Qwen3, thinking, one sample per answer", "qwen3.jinja", "thoughts", "auto"),
    Case("Qwen3.5", "qwen3_5_think.jinja", "plain"),
    Case("Qwen3.5, thinking", "qwen3_5_think.jinja", "thoughts"),
    Case("Qwen3.5, thinking, one sample per answer", "qwen3_5_think.jinja", "thoughts", "auto"),
    Case("Qwen3.8, thinking", "qwen3_8.jinja", "thoughts"),
)


def write_data(folder: Path, files: Sequence[Path], most: int) -> None:
    """Write ``plain.jsonl`` and ``thoughts.jsonl``: the first records of Alpaca files, every other after another."""
    records = [record for file in files for record in json.loads(file.read_text(encoding="utf-8"))[:most]]
    for name, with_thoughts in (("plain", False), ("thoughts", True)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number, record in enumerate(records):
                earlier = [records[number - 1]] if number % 2 else []
                messages = [message for each in (*earlier, record) for message in _messages(each, with_thoughts)]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def _messages(record: dict[str, str], with_thoughts: bool) -> Iterator[dict[str, str]]:
    question = "\n".join(filter(None, (record["instruction"], record.get("input"))))
    yield {"role": "user", "content": question}
    thought = {"reasoning_content": f"The question: {question}\n\nA draft: {record['output']}"} if with_thoughts else {}
    yield {"role": "assistant", **thought, "content": record["output"]}


def write_tokenizer(folder: Path, model: Path, template: Path) -> None:
    """Write the vocabulary of a Qwen v1 checkpoint as the tokenizer of a later family."""
    from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

    from data_utils.byte_pairs import QWEN3_5_PATTERN, QWEN_PATTERN
    from export.layouts.tokenizer import save_fast_tokenizer

    folder.mkdir()
    save_fast_tokenizer(model, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    pattern = QWEN3_5_PATTERN if template.name >= "qwen3_5" else QWEN_PATTERN
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), levels])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")


class Worker:
    """A process of a checkout that encodes the data of a case whenever it is asked to."""

    def __init__(self, checkout: Path, asked: Sequence[tuple[str, str, str]]) -> None:
        script = (ROOT / "benchmarks" / "encoding_process.py").read_text(encoding="utf-8")
        command = [sys.executable, "-c", script, json.dumps(asked)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=checkout, stdin=pipe, stdout=pipe, text=True)
        self.has_case: list[bool] = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def measure(self, case: int) -> dict[str, float]:
        """Encode the data of a case once; return CPU seconds, records and tokens."""
        assert self._process.stdin is not None
        print(case, file=self._process.stdin, flush=True)
        figures: dict[str, float] = self._answer()
        return figures

    def close(self) -> None:
        self._process.communicate()


def figures_of(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    seconds = statistics.median(each["seconds"] for each in rounds)
    records, tokens = rounds[0]["records"], rounds[0]["tokens"]
    return {
        "records": records,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "records_per_second": round(records / seconds),
        "thousand_tokens_per_second": round(tokens / seconds / 1000, 1),
    }


def measure(workers: dict[str, Worker], rounds: int) -> dict[str, dict[str, Any]]:
    """Return the figures of each case by checkout, measured in turns after one round that does not count."""
    results: dict[str, dict[str, Any]] = {}
    for number, case in enumerate(CASES):
        having = {name: worker for name, worker in workers.items() if worker.has_case[number]}
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in having}
        for _ in range(rounds + 1):
            for name, worker in having.items():
                measured[name].append(worker.measure(number))
        results[case.name] = {name: figures_of(each[1:]) for name, each in measured.items()}
        for figures in list(results[case.name].values())[1:]:
            figures["this_checkout_takes"] = round(results[case.name][NEW]["seconds"] / figures["seconds"], 3)
        print(case.name, json.dumps(results[case.name]), flush=True)
    return results


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoding", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model_name_or_path", type=Path, required=True, help="a Qwen v1 checkpoint's folder")
    parser.add_argument("--templates", type=Path, required=True, help="folder with qwen3.jinja and the others")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="files with lists of Alpaca records")
    parser.add_argument("--other", type=Path, nargs="+", default=[], help="checkouts to compare with")
    parser.add_argument("--records", type=int, default=500, help="of each file, at most")
    parser.add_argument("--rounds", type=int, default=5)
    args = parse_args(parser, argv, ROOT / "benchmarks" / "results" / "encoding.json")
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), args.model_name_or_path.resolve()
        write_data(folder, args.texts, args.records)
        for template in {case.template for case in CASES if case.template}:
            write_tokenizer(folder / template, model, args.templates / template)
        asked = [
            (str(folder / case.template if case.template else model), str(folder / f"{case.data}.jsonl"), case.samples)
            for case in CASES
        ]
        workers = {NEW: Worker(ROOT, asked), **{each.name: Worker(each, asked) for each in args.other}}
        results = measure(workers, args.rounds)
        for worker in workers.values():
            worker.close()
    words = (Path(word).name if os.path.isabs(word) else word for word in argv)  # not this machine's folders
    summary = {
        "command": f"python -m benchmarks.encoding {' '.join(words)}",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "tiktoken")},
        "cases": results,
    }
    save_results(summary, args.output)


if __name__ == "__main__":
    main(sys.argv[1:])
