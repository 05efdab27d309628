"""The server's command: who may ask is said aloud, and a signal finishes what runs."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.request import urlopen

import pytest
from openai import OpenAI

from errors import ConfigError, Terminated
from scripts.serve import KEY_VARIABLE, main, parse_args
from tests.models import TINY

MODEL = ["--model_name_or_path", str(TINY)]


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--host", "0.0.0.0"], "other machines could ask without a key"),
        (["--host", "::"], "other machines could ask without a key"),
        (["--host", "example.org"], "other machines could ask without a key"),
        (["--api_key", ""], "--api_key must be printable"),
        (["--api_key", "k", "--no_auth"], "--no_auth contradicts"),
        (["--adapter", "poet"], "--adapter poet: .*Write NAME=DIR"),
        (["--adapter", "base=DIR"], "base cannot be its name"),
        (["--adapter", "poet=A", "--adapter", "poet=B"], "--adapter poet=B: poet is A already"),
        (["--port", "70000"], "--port 70000 is out of range"),
        (["--max_concurrency", "0"], "--max_concurrency 0 is too small"),
        (["--request_timeout", "-1"], "--request_timeout -1.0 is too small"),
        (["--kv_cache", "int4"], "invalid choice"),
    ],
)
def test_flags_that_are_refused(flags: list[str], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=fault):
        parse_args([*MODEL, *flags])


def test_ways_to_be_open_to_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert parse_args([*MODEL]).host == "127.0.0.1"
    assert parse_args([*MODEL, "--host", "0.0.0.0", "--api_key", "k"]).api_key == "k"
    assert parse_args([*MODEL, "--host", "0.0.0.0", "--no_auth"]).api_key is None
    monkeypatch.setenv(KEY_VARIABLE, "from the environment")
    args = parse_args([*MODEL, "--host", "0.0.0.0", "--adapter", "a=b=c", "--adapter", "d=e"])
    assert (args.api_key, args.adapters) == ("from the environment", {"a": "b=c", "d": "e"})


def test_port_that_is_taken_is_refused_before_the_model_is_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with pytest.raises(ConfigError, match=f"--port {port}: cannot be listened on"):
            main(["--model_name_or_path", "/nowhere", "--port", port])


def test_sigterm_finishes_the_answers_that_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A real engine, whole and streamed, and a signal in the middle of a stream."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    found: dict[str, Any] = {}

    def use() -> None:
        while True:
            try:
                urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.05)
        try:
            with OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
                ask: Any = {"model": "Qwen", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
                ask |= {"max_tokens": 60, "stop": ["\x00"]}
                found["whole"] = client.chat.completions.create(**ask).choices[0]
                stream = client.chat.completions.create(**ask, stream=True)
                found["chunks"] = [next(stream), next(stream)]
                os.kill(os.getpid(), signal.SIGTERM)
                found["chunks"] += stream
        finally:
            found.setdefault("chunks", []) or os.kill(os.getpid(), signal.SIGTERM)

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    thread = threading.Thread(target=use)
    thread.start()
    try:
        main([*MODEL, "--port", str(port), "--served_model_name", "Qwen"])
    finally:
        signal.signal(signal.SIGTERM, previous)
        thread.join(20)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in found["chunks"])
    assert text == found["whole"].message.content and text
    assert found["chunks"][-1].choices[0].finish_reason == found["whole"].finish_reason
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    shown = capsys.readouterr().out
    assert f"Serving Qwen (qwen) at {url}" in shown and "curl" in shown and shown.endswith("stopped\n")
