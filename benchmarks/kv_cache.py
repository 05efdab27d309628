"""Caches of keys and values in 8 bits beside the full one: size, speed, perplexity, answers; memory of Qwen-7B.

    python -m benchmarks.kv_cache --model_name_or_path DIR [DIR ...] --data_path FILE [--output FILE]

Rows of 512 tokens are made of conversations of the data. Their second half is read one token at a time, as in an
answer, by all caches in turn, so that times of a step are interleaved; the perplexity is that of these tokens. Then
each cache answers the first questions of some conversations greedily. Memory is rehearsed for the cases that the
original published, without weights and without a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quantize import machine
from benchmarks.results_file import parse_args, save_results
from commands import HelpFormatter

RESULTS = Path(__file__).parent / "results" / "kv_cache.json"
KINDS: list[str | None] = [None, "int8", "fp8"]
ROWS, LENGTH, READ_AT_ONCE, QUESTIONS, ANSWER, SEED = 8, 512, 256, 24, 48, 42


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kv_cache", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model_name_or_path", nargs="+", required=True, help="pretrained checkpoints")
    parser.add_argument("--data_path", required=True, help="conversations")
    args = parse_args(parser, argv, RESULTS)
    from benchmarks.kv_cache_memory import rehearse_tables

    rows = [row for name in args.model_name_or_path for row in measure_model(name, args.data_path)]
    settings = {"rows": ROWS, "length": LENGTH, "questions": QUESTIONS, "answer_tokens": ANSWER}
    command = f"python -m benchmarks.kv_cache --model_name_or_path DIR --data_path {Path(args.data_path).name}"
    results = {"command": command, "machine": machine(), **settings, "models": rows, "memory": rehearse_tables(KINDS)}
    save_results(results, args.output)


def measure_model(name: str, data: str) -> list[dict[str, Any]]:
    """Return a row of figures for each kind of cache."""
    import torch

    from data_utils.encode import EncodeOptions
    from loading.checkpoint import load_checkpoint, load_model
    from quantize.calibration import draw_samples

    checkpoint = load_checkpoint(name)
    model = load_model(checkpoint, torch.bfloat16).eval()
    options = EncodeOptions(max_length=LENGTH)
    samples = draw_samples(checkpoint, [data], 64, options, "auto", SEED, show_progress=False)
    conversations = [*samples.calibration, *samples.held_out]
    stream = torch.tensor([id_ for each in conversations for id_ in map(int, each["input_ids"])])
    rows = stream[: ROWS * LENGTH].view(ROWS, LENGTH)
    questions = [
        list(map(int, each["input_ids"]))[: next(i for i, label in enumerate(each["labels"]) if label >= 0)]
        for each in conversations[:QUESTIONS]
    ]
    with torch.no_grad():
        figures = read_rows(model, rows)
        answers = {kind: answer(model, questions, checkpoint.end_ids, kind) for kind in KINDS}
    results = []
    for kind in KINDS:
        equal = [same_tokens(one, full) for one, full in zip(answers[kind], answers[None], strict=True)]
        result = {"model": checkpoint.model_type, "cache": kind or "full", **figures[kind]}
        result |= {"equal_answers": sum(count is None for count in equal)}
        result |= {"differ_after_tokens": sorted(count for count in equal if count is not None)}
        results.append(result)
        print(json.dumps(result), flush=True)
    return results


def read_rows(model: Any, rows: Any) -> dict[str | None, dict[str, Any]]:
    """Read rows token by token with all caches in turn; return bytes, speed and perplexity."""
    import torch

    from quantize.perplexity import AnswerLosses
    from qwen_model.kv_cache import build_cache, cache_bytes

    caches: dict[str | None, Any] = {kind: build_cache(model.config, kind) for kind in KINDS}
    logits = {kind: model(rows[:, :READ_AT_ONCE], past_key_values=caches[kind]).logits[:, -1] for kind in KINDS}
    losses = {kind: torch.zeros(len(rows)) for kind in KINDS}
    seconds: dict[str | None, list[float]] = {kind: [] for kind in KINDS}
    for position in range(READ_AT_ONCE, LENGTH):
        for kind in KINDS:
            target = rows[:, position]
            losses[kind] += torch.nn.functional.cross_entropy(logits[kind].float(), target, reduction="none")
            started = time.perf_counter()
            logits[kind] = model(target[:, None], past_key_values=caches[kind]).logits[:, -1]
            seconds[kind].append(time.perf_counter() - started)
    count = LENGTH - READ_AT_ONCE
    measured = {kind: AnswerLosses(tuple(sums.tolist()), (count,) * len(rows)) for kind, sums in losses.items()}
    ratios = {
        kind: statistics.median(full / own for own, full in zip(seconds[kind], seconds[None], strict=True))
        for kind in KINDS
    }
    return {
        kind: {
            "bytes_per_token": cache_bytes(caches[kind]) // rows.numel(),
            "tokens_per_second": round(len(rows) / statistics.median(seconds[kind]), 1),
            "speed_to_full": round(ratios[kind], 3),
            "perplexity": round(measured[kind].perplexity, 4),
            **{
                f"perplexity_{name}": round(value, 5)
                for name, value in measured[kind].change_from(measured[None])._asdict().items()
                if kind is not None
            },
        }
        for kind in KINDS
    }


def answer(model: Any, questions: list[list[int]], end_ids: list[int], kind: str | None) -> list[list[int]]:
    """Return greedy answers to all questions, as one batch padded on the left."""
    import torch

    from qwen_model.kv_cache import build_cache

    width = max(map(len, questions))
    ids = torch.tensor([[end_ids[-1]] * (width - len(question)) + question for question in questions])
    mask = torch.tensor([[0] * (width - len(question)) + [1] * len(question) for question in questions])
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=ANSWER, do_sample=False, repetition_penalty=1.0,
        temperature=None, top_p=None, top_k=None, eos_token_id=end_ids, pad_token_id=end_ids[-1],
        past_key_values=build_cache(model.config, kind),
    )  # fmt: skip
    answers: list[list[int]] = output[:, width:].tolist()
    return answers


def same_tokens(one: list[int], other: list[int]) -> int | None:
    """Return after how many tokens two answers differ; ``None``: they are equal."""
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


if __name__ == "__main__":
    main(sys.argv[1:])
