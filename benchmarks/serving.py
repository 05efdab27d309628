"""Speed of answers: of the engine, and of the server beside transformers' server and llama.cpp.

    python -m benchmarks.serving --model_name_or_path build/small
    python -m benchmarks.serving --model_name_or_path build/small --only servers --llama_cpp build/gguf_tools
    python -m benchmarks.serving --model_name_or_path DIR_OF_QWEN_V1 --name v1 --only servers --servers ours

``serving_engine`` and ``serving_servers`` say what each part measures. What counts are the ratios within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.results_file import parse_args, save_results
from benchmarks.serving_engine import measure_engine
from benchmarks.serving_servers import SERVERS, measure_servers
from commands import HelpFormatter

ROOT = Path(__file__).parents[1]
PARTS = ("engine", "servers")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--name", default="real", help="name of the model in the results (default: real)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--questions", type=int, default=16, help="default: 16")
    engine.add_argument("--continuous", action="store_true", help="also transformers' continuous batching")
    servers = parser.add_argument_group("servers")
    servers.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="default: 1 4 16")
    servers.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS), help="default: all")
    servers.add_argument(
        "--llama_cpp", type=Path, metavar="DIR", help="folder of scripts.export_gguf with both packages; else left out"
    )
    args = parse_args(parser, argv, ROOT / "benchmarks" / "results" / "serving.json")
    names = [name for name in args.servers if name != "llama.cpp" or args.llama_cpp is not None]
    results = {"command": "python -m benchmarks.serving --model_name_or_path DIR", "models": {}, **saved(args.output)}
    figures: dict[str, Any] = results["models"].setdefault(args.name, {})
    if "engine" in args.only:
        figures["engine"] = measure_engine(
            args.model_name_or_path, args.questions, args.tokens, args.rounds, args.continuous
        )
    if "servers" in args.only:
        figures["servers"] = measure_servers(
            args.model_name_or_path, names, args.clients, args.tokens, args.rounds, args.llama_cpp
        )
    results["machine"] = {"cpus": os.cpu_count(), "python": platform.python_version()}
    results["versions"] = {name: version(name) for name in ("torch", "transformers")}
    save_results(results, args.output)


def saved(path: Path) -> dict[str, Any]:
    """Return the results in the file, whose other models and parts stay."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


if __name__ == "__main__":
    main(sys.argv[1:])
