"""Servers of ``benchmarks.vllm``: vLLM's and this toolkit's, each a process that is asked over HTTP."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
START_SECONDS, ANSWER_SECONDS = 600, 300
LENGTH = 1024  # tokens of a prompt and its answer
HERMES = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
# On a CPU: one GiB of keys and values, and 4-bit weights times 16-bit values, as on a GPU (the default rounds those to
# 8 bits). Nothing is sent to vLLM's makers.
VLLM_VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_INT4_W4A8": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
}  # fmt: skip


class RefusedError(Exception):
    """A server that ended before it could be asked; the reason it gave."""


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

    port = _free_port()
    limits = httpx2.Limits(max_connections=None)
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as log,
        httpx2.Client(timeout=ANSWER_SECONDS, limits=limits) as client,
    ):
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=ROOT, env={**os.environ, **variables},
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            server = Server(f"http://127.0.0.1:{port}", name, client, process.pid)
            _wait(server, process, log)
            yield server
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGCONT)
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _wait(server: Server, process: subprocess.Popen[Any], log: Any) -> None:
    """Wait until a server answers.

    Raises:
        RefusedError: it ended instead.
    """
    import httpx2

    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            log.seek(0)
            raise RefusedError(reason_of(log.read()))
        try:
            if server.client.get(f"{server.url}/health").status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.5)
    log.seek(0)
    raise RuntimeError(f"{server.name} does not answer after {START_SECONDS} s:\n{log.read()[-3000:]}")


def reason_of(log: str) -> str:
    """Return the message of the error that ended a server, the first one at the end of a traceback in its log."""
    lines = [re.sub(r"^\(\w+ pid=\d+\) (?:ERROR [^\]]+\] )?", "", line) for line in log.splitlines()]
    for number, line in enumerate(lines):
        if re.match(r"[\w.]+Error: ", line):
            # pydantic's message continues on the next line.
            message = lines[number + 1].strip() if "validation error for" in line else line
            return message.partition(" [type=")[0]
    return log.strip()[-500:]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
