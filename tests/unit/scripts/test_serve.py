"""The server's command: who may ask is said aloud, and a signal finishes what runs."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
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
        (["--api_key", ""], "--api_key cannot be sent as a key"),
        (["--api_key", "k", "--no_auth"], "--no_auth contradicts"),
        (["--adapter", "poet"], "--adapter poet: .*Write NAME=DIR"),
        (["--adapter", "base=DIR"], "base cannot be its name"),
        (["--adapter", "poet=A", "--adapter", "poet=B"], "--adapter poet=B: poet is A already"),
        (["--adapter", "a:b=DIR"], "a:b cannot be its name"),
        (["--served_model_name", ""], "--served_model_name is empty"),
        (["--api_key", " key"], "--api_key cannot be sent as a key"),
        (["--api_key", "k" * 5000], "--api_key cannot be sent as a key"),
        (["--allow_origin", "example.org"], "give one such as https://example.org"),
        (["--allow_origin", "http://x/page"], "--allow_origin http://x/page is not the address of a website"),
        (["--allow_origin", "*"], "is not the address of a website"),
        (["--allowed_host", "http://x"], "--allowed_host http://x is not the name of a host"),
        (["--allowed_host", "x:y"], "is not the name of a host"),
        (["--allowed_host", ""], "is not the name of a host"),
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


def test_names_are_those_that_browsers_send() -> None:
    args = parse_args([*MODEL, *("--allowed_host", "Chat.example.org:8000", "--allowed_host", "[::1]:8000")])
    assert args.allowed_host == ["chat.example.org", "::1"]
    given = ["http://x/", "HTTPS://Example.org:443", "http://localhost:3000", "http://[::1]:80/"]
    args = parse_args([*MODEL, *(part for origin in given for part in ("--allow_origin", origin))])
    assert args.allow_origin == ["http://x", "https://example.org", "http://localhost:3000", "http://[::1]"]


def test_empty_key_in_the_environment_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "")
    with pytest.raises(ConfigError, match=f"variable {KEY_VARIABLE} cannot be sent"):
        parse_args([*MODEL, "--host", "0.0.0.0"])


def test_port_that_is_taken_is_refused_before_the_model_is_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with pytest.raises(ConfigError, match=f"--port {port}: cannot be listened on"):
            main(["--model_name_or_path", "/nowhere", "--port", port])


@pytest.fixture
def logging_of_tests() -> Iterator[None]:
    """Undo what the command changes of this process's logging."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    for name in ("serving", "serving.texts", "uvicorn"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def serve_and(use: Callable[[str, OpenAI], None]) -> str:
    """Run the command while a thread uses it, and return its address. SIGTERM ends it if the use fails."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, failures = f"http://127.0.0.1:{port}", []

    def run() -> None:
        while True:
            try:
                urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.05)
        try:
            with OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
                use(url, client)
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        main([*MODEL, "--port", str(port), "--served_model_name", "Qwen"])
    finally:
        signal.signal(signal.SIGTERM, previous)
        thread.join(20)
    assert not failures, failures
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    return url


@pytest.mark.usefixtures("logging_of_tests")
def test_sigterm_finishes_the_answers_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A real engine, whole and streamed, and a signal in the middle of a stream."""
    found: dict[str, Any] = {}

    def use(url: str, client: OpenAI) -> None:
        ask: Any = {"model": "Qwen", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
        ask |= {"max_tokens": 60, "stop": ["\x00"]}
        found["whole"] = client.chat.completions.create(**ask).choices[0]
        stream = client.chat.completions.create(**ask, stream=True)
        found["chunks"] = [next(stream), next(stream)]
        os.kill(os.getpid(), signal.SIGTERM)
        found["chunks"] += stream

    url = serve_and(use)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in found["chunks"])
    assert text == found["whole"].message.content and text
    assert found["chunks"][-1].choices[0].finish_reason == found["whole"].finish_reason
    shown = capsys.readouterr()
    assert f"Serving Qwen (qwen) at {url}" in shown.out and "curl" in shown.out and shown.out.endswith("stopped\n")
    assert re.search(r"stopping: taking no more requests, finishing [01]", shown.err)
    assert re.search(r"stopped after \d+\.\d s: [01] requests finished, 0 cut off", shown.err)


@pytest.mark.usefixtures("logging_of_tests")
def test_second_signal_ends_answers_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """The streams of a long request come to their proper end, and nothing is logged as a failure."""
    reasons: dict[int, str] = {}

    def use(url: str, client: OpenAI) -> None:
        ask: Any = {"model": "Qwen", "messages": [{"role": "user", "content": "Hi"}], "temperature": 100}
        for chunk in client.chat.completions.create(**ask, n=16, seed=1, max_tokens=1900, stream=True):
            if not reasons:  # the signals follow the first chunk
                reasons[-1] = "signalled"
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGTERM)
            if chunk.choices[0].finish_reason:
                reasons[chunk.choices[0].index] = chunk.choices[0].finish_reason

    serve_and(use)
    assert len(reasons) == 17 and "length" in reasons.values()
    shown = capsys.readouterr()
    assert "stopping: taking no more requests, finishing 1; Ctrl-C or SIGTERM again ends their answers" in shown.err
    assert "stopping at once: answers end as they are" in shown.err
    assert "1 requests finished, 0 cut off" in shown.err and shown.out.endswith("stopped\n")
    assert "Traceback" not in shown.err and "ERROR" not in shown.err
