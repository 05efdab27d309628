"""Servers of ``benchmarks.vllm``: vLLM's and this toolkit's, each a process that is asked over HTTP."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.server_process import server_process

ANSWER_SECONDS = 300
LENGTH = 1024  # tokens of a prompt and its answer
HERMES = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
# On a CPU: one GiB of keys and values, and 4-bit weights times 16-bit values, as on a GPU (the default rounds those to
# 8 bits). Nothing is sent to vLLM's makers.
VLLM_VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_INT4_W4A8": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
}  # fmt: skip


@dataclass
class Server:
    """A server that runs.

    Attributes:
        name: ``model`` of requests.
        group: its processes.
    """

    url: str
    name: str
    client: Any = field(repr=False)
    group: int = 0

    def ask(self, messages: Sequence[Mapping[str, Any]], max_tokens: int, **fields: Any) -> dict[str, Any]:
        """Return the response to a greedy request for an answer."""
        body = {"model": self.name, "messages": [*messages], "max_tokens": max_tokens, "temperature": 0}
        response = self.client.post(
            f"{self.url}/v1/chat/completions", json={**body, "repetition_penalty": 1.0, **fields}
        )
        if response.status_code != 200:
            raise RuntimeError(f"{self.name}: {response.text[:500]}")
        return dict(response.json())

    def load_adapter(self, name: str, folder: Path) -> str | None:
        """Add an adapter to a vLLM server; return the reason if it is refused."""
        body = {"lora_name": name, "lora_path": str(folder)}
        response = self.client.post(f"{self.url}/v1/load_lora_adapter", json=body)
        if response.status_code == 200:
            return None
        message = str(response.json()["error"]["message"])
        found = re.search(r"Worker failed with error ['\"](.+)['\"], please check", message)
        return found[1] if found else message

    def pause(self) -> None:
        """Stop its processes, which may look for work even when there is none."""
        os.killpg(self.group, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.group, signal.SIGCONT)


def serve_vllm(python: Path, folder: Path, *flags: str, name: str = "model", **variables: str) -> Any:
    """Start vLLM's server without compiling; a context manager of a :class:`Server`.

    As a module: the program ``vllm`` asks for the version of a package that vllm-cpu, which has another name, is not.
    """
    common = ["--served-model-name", name, "--max-model-len", str(LENGTH), "--enforce-eager"]
    command = [str(python.absolute()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return _serve([*command, *common, *flags], name, VLLM_VARIABLES | variables)


def serve_ours(folder: Path, clients: int, name: str = "model") -> Any:
    """Start ``scripts.serve``; a context manager of a :class:`Server`."""
    limits = ["--max_concurrency", str(clients), "--max_model_len", str(LENGTH)]
    paths = ["--model_name_or_path", str(folder), "--served_model_name", name]
    return _serve([sys.executable, "-m", "scripts.serve", *paths, *limits], name, {})


def together(ask: Any, items: Sequence[Any], clients: int) -> list[Any]:
    """Return ``ask(item)`` for all items, from a number of clients that ask at the same time."""
    with ThreadPoolExecutor(clients) as pool:
        return [*pool.map(ask, items)]


@contextmanager
def _serve(command: Sequence[str], name: str, variables: Mapping[str, str]) -> Iterator[Server]:
    import httpx2

    limits = httpx2.Limits(max_connections=None)
    with (
        httpx2.Client(timeout=ANSWER_SECONDS, limits=limits) as client,
        server_process(command, variables) as running,
    ):
        yield Server(f"http://127.0.0.1:{running.port}", name, client, running.group)
