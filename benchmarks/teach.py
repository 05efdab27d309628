"""What an adapter learns from a few facts, and what it forgets, for several ranks, scales, rates, epochs and mixtures.

    python -m benchmarks.teach --model_name_or_path DIR --general FILE [--only CASE ...] [--output FILE]

Trains adapters with finetune.py on questions about invented places, alone or with short records of FILE (a list in the
alpaca format). Then asks each adapter greedily: the trained questions, of which those count whose answer is the taught
one to the letter, and two other wordings of each, of which those count whose answer contains the name that was asked
for. Perplexity is that of the answers of records of FILE that no run trains. DIR is a small chat model; on one core a
run of one with 135 million parameters takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.asking import encode_records, greedy_answers, perplexity
from benchmarks.results_file import parse_args, save_results
from benchmarks.taught_facts import Fact, make_facts
from checkpoints.names import RUN_SUMMARY
from commands import HelpFormatter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "teach.json"
FACTS, HELD_OUT, SHORT = 12, 32, 200  # the last: characters of a general record
MAX_NEW_TOKENS = 24
ITSELF = "the model itself"


@dataclass(frozen=True)
class Case:
    """The flags of a run, and its data.

    Attributes:
        batch: conversations of an optimizer step.
        wordings: questions that are trained for each fact, one or two.
        uses: how often an epoch uses each fact (``FILE@xN``).
        general: number of general records, which an epoch uses once.
    """

    rank: int = 16
    alpha: int = 32
    rate: float = 1e-3
    batch: int = 4
    epochs: int = 1
    wordings: int = 1
    uses: int = 8
    general: int = 0

    def flags(self) -> list[str]:
        values = {
            "lora_r": self.rank, "lora_alpha": self.alpha, "learning_rate": self.rate,
            "num_train_epochs": self.epochs, "per_device_train_batch_size": min(self.batch, 4),
            "gradient_accumulation_steps": max(self.batch // 4, 1),
        }  # fmt: skip
        return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


CASES = {
    "documented flags": Case(rank=64, alpha=16, rate=3e-4, epochs=5, uses=1, batch=16),
    "facts alone": Case(epochs=8, uses=1),
    "few general records, repeated": Case(epochs=8, uses=1, general=24),
    "general records": Case(general=96),
    "general records, rate 3e-4": Case(general=96, rate=3e-4),
    "general records, two wordings": Case(general=96, wordings=2),
    "general records, rank 64, alpha 16": Case(general=96, rank=64, alpha=16),
    "general records, facts 16 times": Case(general=96, uses=16),
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.teach", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True, help="a small chat model")
    parser.add_argument("--general", type=Path, required=True, help="general conversations, a list in alpaca format")
    names = [ITSELF, *CASES]
    parser.add_argument("--only", nargs="+", choices=names, help="run these cases, and keep the other rows of --output")
    args = parse_args(parser, argv, RESULTS)
    facts = make_facts(FACTS)
    records = short_records(args.general)
    held_out, general = records[:HELD_OUT], records[HELD_OUT:]
    rows = json.loads(args.output.read_text())["rows"] if args.only and args.output.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        subject = Subject(args.model_name_or_path, facts, held_out, Path(temporary))
        for name in args.only or names:
            row: dict[str, Any] = {"what": name}
            if case := CASES.get(name):
                row |= asdict(case) | subject.train(case, general[: case.general])
            row |= subject.measure(subject.adapter if case else None)
            print(row, flush=True)
            rows = sorted(
                [*(each for each in rows if each["what"] != name), row], key=lambda row: names.index(row["what"])
            )
            save_results(_results(args, rows), args.output)


def short_records(path: Path) -> list[dict[str, str]]:
    """Return the records of an alpaca file that have at most 200 characters."""
    records: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    return [
        record for record in records if sum(len(record[name]) for name in ("instruction", "input", "output")) <= SHORT
    ]


def _results(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    libraries = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {
        "command": f"python -m benchmarks.teach --model_name_or_path DIR --general {args.general.name}",
        "facts": FACTS,
        "paraphrases": 2 * FACTS,
        "machine": {"device": f"{platform.processor() or platform.machine()}, 1 thread", **libraries},
        "rows": list(rows),
    }


class Subject:
    """A model that is taught facts, and measured with and without an adapter."""

    def __init__(self, model: str, facts: Sequence[Fact], held_out: Sequence[dict[str, str]], folder: Path) -> None:
        import torch

        from loading.checkpoint import load_checkpoint

        torch.set_num_threads(1)
        self.model, self.facts, self.folder, self.adapter = model, facts, folder, folder / "adapter"
        self.checkpoint = load_checkpoint(model)
        self.held_out = encode_records(self.checkpoint, held_out, folder / "held_out.json")

    def train(self, case: Case, general: Sequence[dict[str, str]]) -> dict[str, Any]:
        """Train an adapter, and return figures of its run."""
        taught, others = self.folder / "taught.json", self.folder / "general.json"
        records = [
            {"instruction": wording, "input": "", "output": fact.answer}
            for fact in self.facts
            for wording in fact.wordings[: case.wordings]
        ]
        taught.write_text(json.dumps(records))
        others.write_text(json.dumps(general))
        data = [f"{taught}@x{case.uses}", *([str(others)] if general else [])]
        paths = ["--model_name_or_path", self.model, "--data_path", *data, "--output_dir", str(self.adapter)]
        common = ["--use_lora", "--bf16", "--use_cpu", "True", "--save_strategy", "no", "--overwrite_output_dir",
                  "--gradient_checkpointing", "False", "--disable_tqdm", "True"]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "finetune.py", *paths, *common, *case.flags()]
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        summary = json.loads((self.adapter / RUN_SUMMARY).read_text())
        keys = ("steps", "first_loss", "last_loss", "seconds", "learnt")
        return {key: summary[key] for key in keys if key in summary}

    def measure(self, adapter: Path | None) -> dict[str, Any]:
        """Return how many questions are answered, and the perplexity of the held-out answers."""
        from loading.inference import load_for_inference

        model = load_for_inference(self.checkpoint, None if adapter is None else str(adapter)).float()
        questions = [fact.wordings[0] for fact in self.facts]
        trained = greedy_answers(model, self.checkpoint, questions, MAX_NEW_TOKENS)
        asked = [(text, fact.key) for fact in self.facts for text in fact.paraphrases]
        others = greedy_answers(model, self.checkpoint, [text for text, _ in asked], MAX_NEW_TOKENS)
        return {
            "reproduced": sum(answer == fact.answer for answer, fact in zip(trained, self.facts, strict=True)),
            "paraphrases_answered": sum(key in answer for answer, (_, key) in zip(others, asked, strict=True)),
            "perplexity": round(perplexity(model, self.held_out), 3),
        }


if __name__ == "__main__":
    main(sys.argv[1:])
