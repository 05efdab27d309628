"""Tokens per second and time to the first token of servers, as clients that stream over HTTP see them.

All servers run at once, each with the checkpoint's own type; a round asks one after the other. In each turn a number of
clients asks at the same time, each its own question, greedy, for the same number of tokens. llama.cpp runs as the
library of llama-cpp-python with a GGUF file in float16, and answers one request at a time.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.server_process import ROOT, server_process

OURS, THEIRS, CONTINUOUS, LLAMA_CPP = "ours", "transformers serve", "transformers serve, continuous", "llama.cpp"
SERVERS = (OURS, THEIRS, CONTINUOUS, LLAMA_CPP)
_ANIMALS = (
    "otter", "heron", "badger", "lynx", "marten", "stork", "hare", "toad",
    "owl", "fox", "newt", "crane", "mole", "swan", "ibex", "wren",
)  # fmt: skip

# A server over llama.cpp's library: one answer after the other, each token as an event.
_LLAMA_SERVER = r"""
import json, sys, threading, uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from llama_cpp import Llama
llama, lock, app = Llama(sys.argv[1], n_ctx=2048, verbose=False), threading.Lock(), FastAPI()

@app.get("/health")
def health():
    return {}

@app.post("/v1/chat/completions")
async def answer(request: Request):
    body = await request.json()
    def events():
        with lock:
            for chunk in llama.create_chat_completion(
                body["messages"], temperature=0.0, max_tokens=body["max_tokens"], stream=True, repeat_penalty=1.0
            ):
                yield f"data: {json.dumps(chunk)}\n\n"
    return StreamingResponse(events(), media_type="text/event-stream")

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[3]), log_level="warning")
"""


@dataclass(frozen=True)
class Turn:
    """What the clients of one turn saw.

    Attributes:
        tokens_per_second: of all answers, from the first question to the last end.
        first: seconds from a question to its first text, the median of the clients.
        last_first: the same, of the client that waited longest.
    """

    tokens_per_second: float
    first: float
    last_first: float


def measure_servers(
    model: str, names: Sequence[str], clients: Sequence[int], tokens: int, rounds: int, tools: Path | None
) -> dict[str, Any]:
    """Return the figures of the servers, and print them.

    Args:
        clients: numbers of clients that ask at the same time.
        tools: folder with llama.cpp's packages.
    """
    turns: dict[tuple[str, int], list[Turn]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = {}
        for name in names:
            server = server_process(command_of(name, model, folder, tools), variables_of(name, tools))
            ports[name] = stack.enter_context(server).port
        for round_ in range(rounds + 1):  # the first one warms up
            for count in clients:
                for name in names:
                    turn = asyncio.run(ask_all(name, ports[name], model, count, tokens))
                    if round_:
                        turns.setdefault((name, count), []).append(turn)
    return {
        "tokens": tokens,
        "rounds": rounds,
        "clients": {str(count): _figures(turns, names, count) for count in clients},
    }


def _figures(turns: dict[tuple[str, int], list[Turn]], names: Sequence[str], count: int) -> dict[str, dict[str, float]]:
    figures = {}
    for name in names:
        rounds = turns[name, count]
        pairs = list(zip(turns[names[0], count], rounds, strict=True))
        figures[name] = {
            "tokens_per_second": round(statistics.median(turn.tokens_per_second for turn in rounds), 1),
            "first_token_seconds": round(statistics.median(turn.first for turn in rounds), 3),
            "last_first_token_seconds": round(statistics.median(turn.last_first for turn in rounds), 3),
            f"speed of {names[0]}, this = 1": round(
                statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in pairs), 2
            ),
            f"first token of {names[0]}, this = 1": round(statistics.median(a.first / b.first for a, b in pairs), 2),
        }
        print(
            f"{count:3} clients  {name:32}", "  ".join(f"{value:8.2f}" for value in figures[name].values()), flush=True
        )
    return figures


def command_of(name: str, model: str, folder: Path, tools: Path | None) -> list[str]:
    """Return the command of a server; for llama.cpp the GGUF file is written first."""
    if name == OURS:
        flags = ["--model_name_or_path", model, "--served_model_name", model]
        return [sys.executable, "-m", "scripts.serve", *flags]
    if name == LLAMA_CPP:
        file = folder / "model.gguf"
        flags = ["--outfile", str(file), "--quantize", "f16", "--tools", str(tools)]
        subprocess.run([sys.executable, "-m", "scripts.export_gguf", model, *flags], cwd=ROOT, check=True)
        return [sys.executable, "-c", _LLAMA_SERVER, str(file)]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", model]
    command += ["--host", "127.0.0.1", "--log-level", "error"]
    # Without a GPU the number of blocks is not found out by itself.
    return [*command, "--continuous-batching", "--cb-num-blocks", "256"] if name == CONTINUOUS else command


def variables_of(name: str, tools: Path | None) -> dict[str, str]:
    """Return the variables of a server's environment."""
    offline = {"HF_HUB_OFFLINE": "1"}
    return offline | {"PYTHONPATH": str(tools.resolve())} if name == LLAMA_CPP and tools else offline


async def ask_all(name: str, port: int, model: str, count: int, tokens: int) -> Turn:
    """Let clients ask a server at the same time."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600, max_retries=0
    ) as client:
        start = time.perf_counter()
        usage = {"stream_options": {"include_usage": True}} if name == OURS else {}  # the others send it unasked
        answers = [
            ask(client, _ANIMALS[index % len(_ANIMALS)], {"model": model, "max_tokens": tokens, **usage})
            for index in range(count)
        ]
        results = await asyncio.gather(*answers)
        seconds = time.perf_counter() - start
    firsts = [first - start for first, _ in results]
    return Turn(sum(pieces for _, pieces in results) / seconds, statistics.median(firsts), max(firsts))


async def ask(client: Any, animal: str, fields: dict[str, Any]) -> tuple[float, int]:
    """Return when the first text of an answer came, and how many tokens the answer has."""
    messages = [{"role": "user", "content": f"Write a long story about a {animal} that travels to the sea."}]
    first, tokens = None, 0
    stream = await client.chat.completions.create(messages=messages, temperature=0, stream=True, **fields)
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first, tokens = first or time.perf_counter(), tokens + 1
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    if first is None:
        raise RuntimeError("the answer has no text")
    return first, tokens
