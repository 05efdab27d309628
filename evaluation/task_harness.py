"""The known benchmarks in EleutherAI's lm-evaluation-harness (lm_eval), over models that this toolkit has loaded.

lm_eval gets questions with whole prompts, and asks the model for likelihoods and answers. It is imported here only.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from evaluation.evaluating import Opened
from evaluation.kept import KeptRows, Key, Row
from evaluation.task_answerer import TaskAnswerer
from evaluation.task_prompts import BENCHMARKS, Item, Judge

REQUESTS = "requests"
"""Set of the rows of kept answers: what lm_eval asked the model."""


class HarnessModel(LM):
    """A model as lm_eval asks it; what it was asked before, in this run or an earlier one, it is not asked again.

    Args:
        kept: its answers; grows.
        advance: called with the number of requests that have been answered.
    """

    def __init__(
        self, opened: Opened, answerer: TaskAnswerer, kept: KeptRows, advance: Callable[[int], object]
    ) -> None:
        super().__init__()
        self._opened, self._answerer, self._kept, self._advance = opened, answerer, kept, advance

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        results = self._results(requests, self._answerer.likelihoods)
        return [(log, bool(is_greedy)) for log, is_greedy in results]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        def write(model: Any, asked: Sequence[tuple[str, Any]]) -> list[str]:
            return self._answerer.write(model, [(prompt, tuple(options["until"])) for prompt, options in asked])

        return self._results(requests, write)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        raise NotImplementedError("no benchmark here asks for the likelihood of a whole text")

    def _results(
        self, requests: Sequence[Any], ask: Callable[[Any, Sequence[tuple[str, Any]]], Sequence[Any]]
    ) -> list[Any]:
        def compute(model: Any, asked: Sequence[tuple[str, Any]]) -> list[Row]:
            return [{"result": result} for result in ask(model, asked)]

        asked: dict[Key, Any] = {
            (self._opened.label, REQUESTS, digest_of(request.args)): request.args for request in requests
        }
        self._opened.add_missing(self._kept, asked, compute, self._advance)
        return [
            self._kept.rows[self._opened.label, REQUESTS, digest_of(request.args)]["result"] for request in requests
        ]


def digest_of(arguments: Sequence[Any]) -> str:
    """Return what identifies a request: of its prompt, and of its continuation or the texts that end the answer."""
    return hashlib.sha256(json.dumps(list(arguments), sort_keys=True).encode()).hexdigest()[:24]


def build_task(name: str, items: Sequence[Item], judge: Judge) -> ConfigurableTask:
    """Return lm_eval's task for the questions of a benchmark."""
    rows = [
        {"index": index, "prompt": item.prompt, "expected": item.expected, "choices": list(item.choices)}
        for index, item in enumerate(items)
    ]
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **options: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "num_fewshot": 0,  # the prompts have their examples
        "doc_to_text": lambda row: row["prompt"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    if items[0].choices:
        config |= {
            "output_type": "multiple_choice",
            "target_delimiter": "",
            "doc_to_choice": lambda row: row["choices"],
            "doc_to_target": lambda row: [choice.strip() for choice in row["choices"]].index(row["expected"]),
        }
    else:
        config |= {
            "output_type": "generate_until",
            "doc_to_target": lambda row: row["expected"],
            "generation_kwargs": {"until": list(BENCHMARKS[name].stops), "do_sample": False},
            "process_results": lambda row, results: {"acc": float(judge(items[row["index"]], results[0]))},
        }
    return ConfigurableTask(config=config)


def run_benchmark(model: LM, name: str, items: Sequence[Item], judge: Judge) -> list[tuple[str, float]]:
    """Return the answer of a model to each question as text, and whether it is right: 1 or 0.

    Args:
        judge: for written answers.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it explains flags of its own command
    task = build_task(name, items, judge)
    results = evaluate(lm=model, task_dict={name: task}, bootstrap_iters=0, log_samples=True)
    answers: dict[int, tuple[str, float]] = {}
    for sample in results["samples"][name]:
        given = [each[0] if isinstance(each, list) else each for each in sample["filtered_resps"]]
        item = items[sample["doc"]["index"]]
        if item.choices:
            logs = [log for log, _ in given]
            text = item.choices[logs.index(max(logs))].strip()
        else:
            text = given[0]
        answers[sample["doc"]["index"]] = (text, float(sample["acc"]))
    return [answers[index] for index in range(len(items))]
