"""Seconds from the start of a process to the first forward pass of a run, or until a plain script has loaded as much.

    python -m benchmarks.startup_contenders run|plain lora|full MODEL DATA

Prints one line of JSON. The time of imports, which a hook in the import system measures, is given apart.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
FLAGS = ("--bf16", "--use_cpu", "--no_data_cache", "--report_to", "none")


class ImportClock:
    """Adds up the seconds in which modules are found and executed; an import inside another counts once."""

    def __init__(self) -> None:
        self.seconds, self._is_running = 0.0, False
        bootstrap: Any = importlib._bootstrap  # type: ignore[attr-defined]
        self._find_and_load: Callable[..., Any] = bootstrap._find_and_load
        bootstrap._find_and_load = self._measured

    def _measured(self, *args: Any) -> Any:
        if self._is_running:
            return self._find_and_load(*args)
        self._is_running, started = True, time.perf_counter()
        try:
            return self._find_and_load(*args)
        finally:
            self._is_running = False
            self.seconds += time.perf_counter() - started


def load_plainly(mode: str, model: str, data: str) -> None:
    """Load the weights, and tokenise every record with the checkpoint's chat template, in one thread."""
    import torch
    import transformers.trainer  # noqa: F401 - a script that trains imports it
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if mode == "lora" else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with open(data, encoding="utf-8") as file:
        records = json.load(file)
    for record in records:
        question = "\n".join(filter(None, (record["instruction"], record.get("input"))))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
        tokenizer.apply_chat_template(messages)


def run_to_first_step(mode: str, model: str, data: str, output: str, report: Callable[[], NoReturn]) -> None:
    """Start a run with the default flags of its mode, and call ``report`` in place of its first forward pass."""
    from commands import importing

    with importing():
        from training.trainer import QwenTrainer
    setattr(QwenTrainer, "compute_loss", lambda *args, **kwargs: report())  # noqa: B010 - a method
    flags = [*FLAGS, "--use_lora"] if mode == "lora" else FLAGS
    sys.argv[1:] = ["--model_name_or_path", model, "--data_path", data, "--output_dir", output, *flags]
    runpy.run_path(str(ROOT / "finetune.py"), run_name="__main__")


def measure(contender: str, mode: str, model: str, data: str) -> None:
    clock, started = ImportClock(), time.perf_counter()

    def report() -> NoReturn:
        seconds = time.perf_counter() - started
        print(json.dumps({"imports": clock.seconds, "rest": seconds - clock.seconds}), flush=True)
        os._exit(0)  # a run would report the missing loss

    if contender == "run":
        with tempfile.TemporaryDirectory() as folder:
            run_to_first_step(mode, model, data, f"{folder}/output", report)
    load_plainly(mode, model, data)
    report()


if __name__ == "__main__":
    measure(*sys.argv[1:])
