"""Questions per minute of the engine: together, one at a time, and as transformers answers them.

    python -m benchmarks.serving --model_name_or_path build/small

Each way answers the same prompts of different lengths, greedy, with the same number of tokens each. They take turns,
so that other load of the machine affects all of them; what counts are the ratios of their medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results_file import parse_args, save_results
from commands import HelpFormatter

if TYPE_CHECKING:
    from serving.engine import Engine

ROOT = Path(__file__).parents[1]
Prompts = list[tuple[int, ...]]

TOGETHER, ALONE = "engine, together", "engine, one at a time"
GENERATE, CONTINUOUS = "generate(), one at a time", "generate_batch(), together"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--continuous", action="store_true", help="also transformers' continuous batching")
    parser.add_argument("--name", default="real", help="name of the result in the file")
    args = parse_args(parser, argv, ROOT / "benchmarks" / "results" / "serving.json")
    from serving.engine import Engine

    with Engine.load(args.model_name_or_path, max_concurrency=args.questions) as engine:
        ways = ways_of(engine, args.tokens, args.continuous)
        prompts = random_prompts(args.questions, len(engine.tokenizer))
        same = check_equal(ways, prompts)
        seconds = {name: statistics.median(times) for name, times in measure(ways, prompts, args.rounds).items()}
    rates = {name: round(60 * args.questions / value, 2) for name, value in seconds.items()}
    ratios = {name: round(value / rates[ALONE], 2) for name, value in rates.items()}
    for name, rate in rates.items():
        print(f"{rate:9.1f} questions per minute {ratios[name]:7.2f}x  {name}")
    print(f"equal answers: {same}")
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.serving --questions {args.questions} --tokens {args.tokens}",
        "name": args.name,
        "rounds": args.rounds,
        "questions_per_minute": rates,
        "ratio_to_one_at_a_time": ratios,
        "tokens_per_second": {name: round(rate * args.tokens / 60, 1) for name, rate in rates.items()},
        "equal_answers": same,
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    save_results(result, args.output)


def random_prompts(count: int, vocabulary: int) -> Prompts:
    """Return prompts of 16 to 128 tokens."""
    draw = random.Random(0)
    return [tuple(draw.randrange(300, vocabulary - 300) for _ in range(draw.randint(16, 128))) for _ in range(count)]


def ways_of(engine: Engine, tokens: int, continuous: bool) -> dict[str, Callable[[Prompts], Prompts]]:
    """Return functions that answer prompts with a number of tokens each."""
    import torch
    from transformers import GenerationConfig, logging

    from serving.requests import Request, Sampling

    logging.set_verbosity_error()  # of an end token that no model has
    greedy = Sampling(temperature=0.0, repetition_penalty=1.0, max_tokens=tokens, ignore_end=True)
    model = engine.model
    settings = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0)

    def together(prompts: Prompts) -> Prompts:
        tickets = [engine.submit(Request(prompt, greedy)) for prompt in prompts]
        return [ticket.answer().token_ids for ticket in tickets]

    def alone(prompts: Prompts) -> Prompts:
        return [engine.submit(Request(prompt, greedy)).answer().token_ids for prompt in prompts]

    def generate(prompts: Prompts) -> Prompts:
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            answers.append(tuple(output[0, len(prompt) :].tolist()))
        return answers

    def generate_batch(prompts: Prompts) -> Prompts:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        blocks = ContinuousBatchingConfig(num_blocks=16 * len(prompts), max_batch_tokens=4096)
        outputs = model.generate_batch(
            [list(prompt) for prompt in prompts], generation_config=settings, continuous_batching_config=blocks
        )
        return [tuple(output.generated_tokens) for output in outputs.values()]

    ways: dict[str, Callable[[Prompts], Prompts]] = {TOGETHER: together, ALONE: alone, GENERATE: generate}
    if continuous:
        ways[CONTINUOUS] = generate_batch
    return ways


def check_equal(ways: dict[str, Callable[[Prompts], Prompts]], prompts: Prompts) -> dict[str, str]:
    """Return how many answers of each way are those of the engine one at a time; also a first run of each."""
    answers = {name: answer(prompts) for name, answer in ways.items()}
    return {
        name: f"{sum(a == b for a, b in zip(each, answers[ALONE], strict=True))} of {len(prompts)}"
        for name, each in answers.items()
    }


def measure(ways: dict[str, Callable[[Prompts], Prompts]], prompts: Prompts, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, answer in ways.items():
            started = time.perf_counter()
            answer(prompts)
            seconds[name].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main(sys.argv[1:])
