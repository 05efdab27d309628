"""Questions per minute of the engine: together, one at a time, and as transformers answers them.

Each way answers the same prompts of different lengths, greedy, with the same number of tokens each. They take turns,
so that other load of the machine affects all of them; what counts are the ratios of their medians.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.engine import Engine

Prompts = list[tuple[int, ...]]

TOGETHER, ALONE = "engine, together", "engine, one at a time"
GENERATE, CONTINUOUS = "generate(), one at a time", "generate_batch(), together"


def measure_engine(model: str, questions: int, tokens: int, rounds: int, continuous: bool) -> dict[str, Any]:
    """Return the figures, and print them."""
    from loading.checkpoint import load_checkpoint
    from loading.inference import load_for_inference
    from serving.engine import Engine

    with Engine.load(model, max_concurrency=questions) as engine:
        own = load_for_inference(load_checkpoint(model))  # the engine's model has blocks of its own
        ways = ways_of(engine, own, tokens, continuous)
        prompts = random_prompts(questions, len(engine.tokenizer))
        same = check_equal(ways, prompts)
        seconds = {name: statistics.median(times) for name, times in measure(ways, prompts, rounds).items()}
    rates = {name: round(60 * questions / value, 2) for name, value in seconds.items()}
    ratios = {name: round(value / rates[ALONE], 2) for name, value in rates.items()}
    for name, rate in rates.items():
        print(f"{rate:9.1f} questions per minute {ratios[name]:7.2f}x  {name}")
    print(f"equal answers: {same}")
    return {
        "questions": questions,
        "tokens": tokens,
        "rounds": rounds,
        "questions_per_minute": rates,
        "ratio_to_one_at_a_time": ratios,
        "tokens_per_second": {name: round(rate * tokens / 60, 1) for name, rate in rates.items()},
        "equal_answers": same,
    }


def random_prompts(count: int, vocabulary: int) -> Prompts:
    """Return prompts of 16 to 128 tokens."""
    draw = random.Random(0)
    return [tuple(draw.randrange(300, vocabulary - 300) for _ in range(draw.randint(16, 128))) for _ in range(count)]


def ways_of(engine: Engine, model: Any, tokens: int, continuous: bool) -> dict[str, Callable[[Prompts], Prompts]]:
    """Return functions that answer prompts with a number of tokens each.

    Args:
        model: what transformers answers with.
    """
    import torch
    from transformers import GenerationConfig, logging

    from serving.requests import Request, Sampling

    logging.set_verbosity_error()  # of an end token that no model has
    greedy = Sampling(temperature=0.0, repetition_penalty=1.0, max_tokens=tokens, ignore_end=True)
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
