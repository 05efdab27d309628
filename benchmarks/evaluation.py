"""Questions per minute of ``scripts.evaluate`` on known benchmarks, beside lm_eval's own model, and on held-out data.

    python -m benchmarks.evaluation --model_name_or_path DIR [--parts held_out gsm8k mmlu] [--ways ...] [--questions 8]

``gsm8k``, ``mmlu``: generated questions in the files of GSM8K (8 examples in a prompt, answers of ``--tokens``) and of
MMLU (5 examples), asked in the same prompts of this toolkit and of lm_eval's model for transformers (``HFLM``), each
with the checkpoint as it is stored and in float32, and compared with the first of these. Need lm_eval: ``pip install
-r requirements_evaluate.txt``.

``held_out``: conversations of ``examples/``, whose last answers are written and whose losses are taken: by blocks and
packed weights of the engine with losses in batches, and by transformers' blocks with losses one at a time.

Loading is not measured. The file of results keeps what was measured before of other parts and ways.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from benchmarks.results_file import parse_args, save_results
from commands import HelpFormatter

if TYPE_CHECKING:
    from evaluation.task_prompts import Item

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "evaluation.json"
BATCH = 8
TASKS = ("gsm8k", "mmlu")
FIRST = "scripts.evaluate, float32"
WAYS = (FIRST, "HFLM, float32", "scripts.evaluate, as stored", "HFLM, as stored")

# ---------------------------------------------------------------------------------------------------------- questions


def write_questions(folder: Path, count: int) -> None:
    """Write questions of arithmetic in the files of GSM8K and MMLU."""
    draw = Random(0)
    for split, number in (("train", 8), ("test", count)):
        (folder / "gsm8k").mkdir(parents=True, exist_ok=True)
        records = [word_problem(draw) for _ in range(number)]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "gsm8k" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    for split, number in (("dev", 5), ("test", count)):
        (folder / "mmlu" / split).mkdir(parents=True, exist_ok=True)
        lines = "".join(choice_question(draw) + "\n" for _ in range(number))
        (folder / "mmlu" / split / f"elementary_arithmetic_{split}.csv").write_text(lines, encoding="utf-8")


def word_problem(draw: Random) -> dict[str, str]:
    boxes, each, sold, price = (draw.randint(2, 19) for _ in range(4))
    total = boxes * each
    question = (
        f"A shop receives {boxes} boxes on Monday morning, and every box has {each} bottles of juice in it. During the "
        f"week {sold} bottles break and are thrown away. The others are sold for {price} dollars each. How many "
        "dollars does the shop take for the bottles that it sells?"
    )
    answer = (
        f"The shop receives {boxes} * {each} = <<{boxes}*{each}={total}>>{total} bottles.\nAfter {sold} bottles break, "
        f"{total} - {sold} = <<{total}-{sold}={total - sold}>>{total - sold} bottles are left.\nThey bring "
        f"{total - sold} * {price} = <<{total - sold}*{price}={(total - sold) * price}>>{(total - sold) * price} "
        f"dollars.\n#### {(total - sold) * price}"
    )
    return {"question": question, "answer": answer}


def choice_question(draw: Random) -> str:
    first, second = draw.randint(11, 99), draw.randint(11, 99)
    wrong = draw.sample([step for step in range(-20, 21) if step], 3)
    answers = [first + second, *(first + second + step for step in wrong)]
    draw.shuffle(answers)
    question = (
        f"A train has {first} passengers when it leaves the first station, and {second} more people board it at the "
        "second one, where nobody gets off. How many passengers does it have when it reaches the third station?"
    )
    return ",".join([f'"{question}"', *map(str, answers), "ABCD"[answers.index(first + second)]])


# -------------------------------------------------------------------------------------------------- known benchmarks


def measure_task(name: str, args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the figures of each way by its name."""
    from evaluation.task_flags import read_items

    write_questions(folder / "data", args.questions)
    flags = {"num_fewshot": None, "limit": None, "seed": 0, "apply_chat_template": False}
    [items] = read_items(argparse.Namespace(tasks=name, data_dir=folder / "data", **flags)).values()
    wide = write_in_float32(args.model_name_or_path, folder / "float32")
    of_first: dict[str, Any] = {}
    for way in dict.fromkeys([FIRST, *args.ways]):
        build = build_own if way.startswith("scripts") else build_theirs
        lm = build(wide if way.endswith("float32") else args.model_name_or_path, args.tokens)
        seconds, accuracy, results = min((ask(lm(), name, items) for _ in range(args.rounds)), key=lambda each: each[0])
        of_first = of_first or results
        rate = round(60 * len(items) / seconds, 2)
        yield {way: {"questions_per_minute": rate, "accuracy": accuracy, **compared(results, of_first)}}


def write_in_float32(model: Path, folder: Path) -> Path:
    """Write a copy of a checkpoint whose weights are float32, and return its folder."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, folder)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(folder)
    return folder


def build_own(model: Path, tokens: int) -> Callable[[], Any]:
    """Return a function that returns the harness model of ``scripts.evaluate``, which knows no answers yet."""
    from evaluation.evaluating import Opened, Subject
    from evaluation.kept import ANSWER_KEY
    from evaluation.task_answerer import TaskAnswerer
    from evaluation.task_harness import HarnessModel

    class NothingKept:
        """Rows in memory."""

        key = ANSWER_KEY

        def __init__(self) -> None:
            self.rows: dict[Any, Any] = {}

        def add(self, rows: Sequence[dict[str, Any]]) -> None:
            self.rows |= {tuple(row[name] for name in self.key): row for row in rows}

    opened = Opened(Subject("base", str(model)))
    assert opened.model is not None, "loaded before anything is measured"
    answerer = TaskAnswerer(opened.checkpoint, None, BATCH, tokens)
    kept: Any = NothingKept
    return lambda: HarnessModel(opened, answerer, kept(), lambda count: None)


def build_theirs(model: Path, tokens: int) -> Callable[[], Any]:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from loading.checkpoint import load_checkpoint

    class Limited(HFLM):  # type: ignore[misc]
        max_gen_toks = property(lambda self: tokens)

    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = load_checkpoint(str(model)).tokenizer  # as in tokenizer.json, which transformers may change
    return lambda: Limited(pretrained=loaded, tokenizer=tokenizer, batch_size=BATCH, add_bos_token=False)


def ask(lm: Any, name: str, items: Sequence[Item]) -> tuple[float, float, dict[str, Any]]:
    """Return seconds and accuracy of a model on a benchmark, and its result of each request."""
    from evaluation.task_harness import digest_of, run_benchmark
    from evaluation.task_prompts import is_right_number

    found: dict[str, Any] = {}
    kind = "loglikelihood" if items[0].choices else "generate_until"
    compute = getattr(lm, kind)
    seconds = 0.0

    def recorded(requests: Sequence[Any]) -> list[Any]:
        nonlocal seconds
        start = time.perf_counter()
        results: list[Any] = compute(requests)
        seconds = time.perf_counter() - start
        found.update(zip([digest_of(request.args) for request in requests], results, strict=True))
        return results

    setattr(lm, kind, recorded)
    answers = run_benchmark(lm, name, items, lambda item, answer: is_right_number(answer, item.expected))
    return seconds, sum(right for _, right in answers) / len(items), found


def compared(results: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Return how far results are from those of another model: logarithms of likelihoods, or equal answers."""
    pairs = [(result, others[key]) for key, result in results.items()]
    if isinstance(pairs[0][0], str):
        return {"equal_answers": f"{sum(one == other for one, other in pairs)} of {len(pairs)}"}
    return {"largest_difference": float(f"{max(abs(one[0] - other[0]) for one, other in pairs):.2g}")}


# ----------------------------------------------------------------------------------------------------------- held out


def measure_held_out(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of answers and losses."""
    from evaluation.evaluating import Opened, Sets, Subject
    from evaluation.losses import answer_losses
    from loading.inference import load_for_inference

    opened = Opened(Subject("base", str(args.model_name_or_path)))
    sets = Sets(opened, args.tokens)
    sets.read("held_out", [str(ROOT / "examples" / "identity.json")], "auto", args.conversations, 0)
    asked = sets.questions["held_out"]
    examples = [sets.examples["held_out"][question.index] for question in asked]
    plain = load_for_inference(opened.checkpoint)
    ways: dict[str, Callable[[], Any]] = {
        "answers": lambda: sets.answerer.answer(opened.model, asked),
        "answers, transformers' blocks": lambda: sets.answerer.answer(plain, asked),
        "losses": lambda: answer_losses(opened.model, examples),
        "losses, one at a time": lambda: [answer_losses(opened.model, [example])[0] for example in examples],
        "losses, transformers' blocks, one at a time": lambda: [
            answer_losses(plain, [example])[0] for example in examples
        ],
    }
    assert opened.model is not None, "loaded before anything is measured"
    seconds: dict[str, float] = {}
    found: dict[str, Any] = {}
    for _ in range(args.rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            found[name] = run()
            seconds[name] = min(time.perf_counter() - start, seconds.get(name, float("inf")))
    rates = {name: round(60 * len(asked) / value, 1) for name, value in seconds.items()}
    pairs = list(zip(found["answers"], found["answers, transformers' blocks"], strict=True))
    totals = [
        [sum(turn.loss for turn in turns) for turns in losses]
        for name, losses in found.items()
        if name.startswith("losses")
    ]
    return {
        "conversations_per_minute": rates,
        "equal_answers": f"{sum(one == other for one, other in pairs)} of {len(asked)}",
        "largest_difference_of_a_loss": max((max(each) - min(each)) / min(each) for each in zip(*totals, strict=True)),
    }


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model_name_or_path", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--parts", nargs="+", choices=["held_out", *TASKS], default=["held_out", *TASKS])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--questions", type=int, default=8, help="of each benchmark (default: 8)")
    parser.add_argument("--conversations", type=int, default=16, help="held out (default: 16)")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of an answer (default: 48)")
    parser.add_argument("--rounds", type=int, default=1, help="the fastest counts (default: 1)")
    args = parse_args(parser, argv, RESULTS)
    with tempfile.TemporaryDirectory() as name:
        for part in args.parts:
            measured = [measure_held_out(args)] if part == "held_out" else measure_task(part, args, Path(name) / part)
            for figures in measured:
                print(part, figures, flush=True)
                add_figures(part, figures, args)


def add_figures(part: str, figures: dict[str, Any], args: argparse.Namespace) -> None:
    """Write figures of a part; others, which may have been measured before, stay."""
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    of_part = ("conversations",) if part == "held_out" else ("questions",)
    settings = {key: getattr(args, key) for key in (*of_part, "tokens", "rounds")}
    settings["threads"] = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    libraries = ["torch", "transformers", *(["lm_eval"] if part in TASKS else [])]
    results |= {
        "command": "python -m benchmarks.evaluation",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {**results.get("versions", {}), **{each: version(each) for each in libraries}},
        part: {**results.get(part, {}), **settings, **figures},
    }
    save_results(results, args.output)


if __name__ == "__main__":
    main(sys.argv[1:])
