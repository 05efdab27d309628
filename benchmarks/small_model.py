"""Measure training, quantising, merging and exporting of a small real model.

    python -m benchmarks.small_model --model_name_or_path DIR --data_path FILE [--qwen DIR] [--tools DIR]
                                     [--only PART ...] [--output FILE]

DIR is SmolLM2-135M-Instruct in the layout qwen2 (``python -m scripts.make_small_qwen``), FILE a list of general
conversations in the alpaca format.

facts       the recipe of docs/training.md teaches 12 invented facts: trained questions answered to the letter, other
            wordings that name the fact, and the perplexity of general answers, before and after
lora, ...   40 steps of 4 general conversations with LoRA, all parameters, and Q-LoRA on NF4, GPTQ and AWQ: perplexity
            of other conversations' answers, before (quantised where the method does so) and after
quantised   perplexity after scripts.quantize to 4 bits in groups of 64, and after rounding to nearest
merged      the adapter of ``facts`` merged: the share of its greedy answers that are the same, and the perplexity
layouts     the same for the model in Qwen v1's layout (``--qwen DIR``), both in float32
gguf        the same for the merged float32 model as a GGUF file in llama.cpp (``--tools DIR``)

Parts that need the adapter or a quantised model make it. Every figure is of one run, in float32 but for a merge in
bfloat16; two threads take an hour or two.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from operator import methodcaller
from pathlib import Path
from typing import Any

from benchmarks.asking import encode_questions, encode_records, greedy_answers, perplexity
from benchmarks.results_file import parse_args, save_results
from benchmarks.taught_facts import make_facts
from benchmarks.teach import CASES, FACTS, HELD_OUT, Subject, short_records
from commands import HelpFormatter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "small_model.json"
RECIPE = "general records, two wordings"  # that of docs/training.md
STEPS, TRAINED = 40, 160
NEW_TOKENS = 32
METHODS = {
    "lora": ("--use_lora",),
    "all parameters": ("--learning_rate", "1e-5"),
    "q_lora nf4": ("--use_lora", "--q_lora"),
    "q_lora gptq": ("--use_lora", "--q_lora"),
    "q_lora awq": ("--use_lora", "--q_lora"),
}


class SmallModel:
    """The model, its data, and the folders that parts share.

    Args:
        model: folder in the layout qwen2.
        records: general conversations in the alpaca format; the first ones are held out.
        work: folder for adapters, merged and quantised models.
        steps: optimizer steps of a method's run.
        qwen: the same model in Qwen v1's layout.
        tools: folder of scripts.export_gguf, with llama-cpp-python.
    """

    def __init__(
        self, model: Path, records: Sequence[dict[str, Any]], work: Path, steps: int = STEPS,
        qwen: Path | None = None, tools: Path | None = None,
    ) -> None:  # fmt: skip
        self.model, self.work, self.steps, self.qwen, self.tools = model, work, steps, qwen, tools
        self.held_out, self.general = records[:HELD_OUT], records[HELD_OUT:]

    @cached_property
    def subject(self) -> Subject:
        return Subject(str(self.model), make_facts(FACTS), self.held_out, self.work)

    @cached_property
    def taught(self) -> Path:
        """The adapter of the recipe."""
        case = CASES[RECIPE]
        self.subject.train(case, self.general[: case.general])
        return self.subject.adapter

    @cached_property
    def merged(self) -> Path:
        """``taught`` merged in float32."""
        return self._merge("merged", "--dtype", "fp32")

    def facts(self) -> dict[str, Any]:
        before, after = self.subject.measure(None), self.subject.measure(self.taught)
        return {"recipe": asdict(CASES[RECIPE]), "questions": FACTS, "other_wordings": 2 * FACTS,
                "before": before, "after": after, **_change(before["perplexity"], after["perplexity"])}  # fmt: skip

    def method(self, name: str) -> dict[str, Any]:
        """Train by one of ``METHODS``."""
        data = self.work / "train.json"
        data.write_text(json.dumps(self.general[:TRAINED]))
        kind, output = name.rpartition(" ")[2], self.work / f"method {name}"
        base = self.quantised_folder(kind) if kind in ("gptq", "awq") else self.model
        _run("finetune.py", "--model_name_or_path", base, "--data_path", data, "--output_dir", output, "--max_steps",
             self.steps, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--use_cpu", "True",
             "--gradient_checkpointing", "False", "--save_strategy", "no", "--disable_tqdm", "True",
             *METHODS[name])  # fmt: skip
        is_adapter = "--use_lora" in METHODS[name]
        after = self._perplexity(base if is_adapter else output, output if is_adapter else None)
        before = self._perplexity(base, output if kind == "nf4" else None, without_adapter=True)
        return {"flags": list(map(str, METHODS[name])), "steps": self.steps, **_change(before, after)}

    def quantised(self) -> dict[str, Any]:
        rows = {}
        for format_ in ("gptq", "awq"):
            report = json.loads((self.quantised_folder(format_) / "quantization_report.json").read_text())
            figures = {name: round(value, 3) for name, value in report["perplexity"].items()}
            rise = {name: round(change["value"], 4) for name, change in report["change"].items()}
            rows[format_] = {"perplexity": figures, "rise_of_the_loss": rise,
                             "at_most": round(report["change"]["after"]["high"], 4)}  # fmt: skip
        return rows

    def merges(self) -> dict[str, Any]:
        expected = self._behaviour(self.model, self.taught)
        bf16 = self._behaviour(self._merge("merged-bf16"), None)
        return {"adapter": _figures(expected, expected), "fp32": _figures(self._behaviour(self.merged, None), expected),
                "bf16": _figures(bf16, expected)}  # fmt: skip

    def layouts(self) -> dict[str, Any]:
        """Compare answers to questions of one line, because the tokenizers divide line ends in two ways.

        With a system message, because the layouts have different ones for conversations without one.
        """
        assert self.qwen is not None
        questions = [text for text in self._questions if "\n" not in text]
        qwen2, qwen = (
            greedy_answers(model, checkpoint, questions, NEW_TOKENS, "You are a helpful assistant.")
            for checkpoint, model in (_load(folder) for folder in (self.model, self.qwen))
        )
        return {"answers_equal": _equal(qwen, qwen2)}

    def gguf(self) -> dict[str, Any]:
        from benchmarks.llama_cpp import ask_llama_cpp
        from loading.checkpoint import load_checkpoint

        assert self.tools is not None
        checkpoint, rows = load_checkpoint(str(self.merged)), {}
        prompts = encode_questions(checkpoint, self._questions)
        requests = {"texts": [], "prompts": prompts, "greedy_tokens": NEW_TOKENS, "end_ids": checkpoint.end_ids}
        expected, _ = self._behaviour(self.merged, None)
        for type_ in ("f32", "f16", "q8_0", "q4_k_m"):
            folder = self.work / type_
            folder.mkdir()
            flags = ("--outfile", folder / "model.gguf", "--quantize", type_, "--tools", self.tools)
            _run("-m", "scripts.export_gguf", self.merged, *flags)
            greedy = ask_llama_cpp(folder / "model.gguf", requests, self.tools, folder)["greedy"]
            answers = [checkpoint.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in greedy]
            rows[type_] = {"answers_equal": _equal(answers, expected)}
        return rows

    def quantised_folder(self, format_: str) -> Path:
        """Return the model in 4 bits in groups of 64; written once."""
        folder = self.work / f"small-{format_}"
        if not folder.exists():
            calibration = self.work / "calibration.json"
            calibration.write_text(json.dumps(self.general))
            _run("-m", "scripts.quantize", "--model_name_or_path", self.model, "--data_path", calibration,
                 "--output_dir", folder, "--format", format_, "--group_size", 64, "--samples", 32)  # fmt: skip
        return folder

    def _perplexity(self, model: Path, adapter: Path | None, *, without_adapter: bool = False) -> float:
        """Return the perplexity of the held-out answers. An adapter on NF4 rounds its base while that is loaded."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        checkpoint, loaded = _load(model, adapter)
        if without_adapter and adapter is not None:
            for module in loaded.modules():
                if isinstance(module, BaseTunerLayer):
                    module.enable_adapters(False)
        return perplexity(loaded, encode_records(checkpoint, self.held_out, self.work / "held_out.json"))

    def _merge(self, name: str, *flags: str) -> Path:
        output = self.work / name
        _run("merge_lora.py", "--adapter", self.taught, "--output", output, *flags)
        return output

    @property
    def _questions(self) -> list[str]:
        facts = [fact.wordings[0] for fact in self.subject.facts]
        return facts + [record["instruction"] for record in self.held_out if not record["input"]][:FACTS]

    def _behaviour(self, model: Path, adapter: Path | None) -> tuple[list[str], float]:
        """Return the answers to the facts' and some general questions, and the held-out perplexity."""
        checkpoint, loaded = _load(model, adapter)
        answers = greedy_answers(loaded, checkpoint, self._questions, NEW_TOKENS)
        return answers, perplexity(loaded, encode_records(checkpoint, self.held_out, self.work / "held_out.json"))


PARTS: dict[str, Callable[[SmallModel], dict[str, Any]]] = {
    "facts": SmallModel.facts,
    **{name: methodcaller("method", name) for name in METHODS},
    "quantised": SmallModel.quantised, "merged": SmallModel.merges, "layouts": SmallModel.layouts,
    "gguf": SmallModel.gguf,
}  # fmt: skip
NEEDS = {"layouts": "qwen", "gguf": "tools"}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.small_model", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model_name_or_path", type=Path, required=True, help="the small model in the layout qwen2")
    parser.add_argument("--data_path", type=Path, required=True, help="general conversations, a list in alpaca format")
    parser.add_argument("--qwen", type=Path, help="the small model in the layout qwen, for the part layouts")
    parser.add_argument("--tools", type=Path, help="folder with llama-cpp-python, for the part gguf")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="run these parts, and keep the other rows")
    args = parse_args(parser, argv, RESULTS)
    names = args.only or [name for name in PARTS if name not in NEEDS or getattr(args, NEEDS[name])]
    if missing := [f"--{NEEDS[name]} for {name}" for name in names if name in NEEDS and not getattr(args, NEEDS[name])]:
        parser.error(f"missing: {', '.join(missing)}")
    rows = json.loads(args.output.read_text())["rows"] if args.only and args.output.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        small = SmallModel(args.model_name_or_path.resolve(), short_records(args.data_path), Path(temporary),
                           qwen=args.qwen, tools=args.tools)  # fmt: skip
        for name in names:
            rows[name] = PARTS[name](small)
            print(name, json.dumps(rows[name], ensure_ascii=False), flush=True)
            save_results(_results(args, {each: rows[each] for each in PARTS if each in rows}), args.output)


def _load(model: Path, adapter: Path | None = None) -> tuple[Any, Any]:
    """Return a checkpoint, and its model in float32: bfloat16 takes several times as long on many processors."""
    from loading.checkpoint import load_checkpoint
    from loading.inference import load_for_inference

    checkpoint = load_checkpoint(str(model))
    return checkpoint, load_for_inference(checkpoint, None if adapter is None else str(adapter)).float()


def _run(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


def _change(before: float, after: float) -> dict[str, float]:
    return {
        "perplexity_before": round(before, 3),
        "perplexity_after": round(after, 3),
        "ratio": round(after / before, 4),
    }


def _equal(answers: Sequence[str], expected: Sequence[str]) -> str:
    return f"{sum(map(str.__eq__, answers, expected))} of {len(expected)}"


def _figures(found: tuple[list[str], float], expected: tuple[list[str], float]) -> dict[str, Any]:
    return {"answers_equal": _equal(found[0], expected[0]), "perplexity": round(found[1], 4)}


def _results(args: argparse.Namespace, rows: dict[str, Any]) -> dict[str, Any]:
    libraries = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {
        "command": f"python -m benchmarks.small_model --model_name_or_path DIR --data_path {args.data_path.name}"
        " --qwen DIR --tools DIR",
        "machine": {"device": platform.processor() or platform.machine(), **libraries},
        "rows": rows,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
