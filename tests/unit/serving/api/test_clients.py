"""Clients that leave, read slowly, come together, or send nonsense: no slot is lost, and nothing fails."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from openai import AsyncOpenAI, InternalServerError, OpenAI

import serving.api.connection as connection
from chat.families import Family
from serving.requests import Request
from tests.fuzz_requests import MUTATIONS, mutated_requests
from tests.serving_api import ScriptedEngine, served, wait_until

CHAT = "/v1/chat/completions"
ASK: Any = [{"role": "user", "content": "Hi"}]


def endless(request: Request) -> Any:
    while True:
        yield "word "


def send(url: str, **fields: Any) -> socket.socket:
    """Send a chat request on a connection of its own, with a small buffer for the answer."""
    body = json.dumps({"model": "tiny", "messages": ASK, **fields}).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(5)
    client.connect((urlsplit(url).hostname, urlsplit(url).port))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return client


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_frees_its_place(stream: bool) -> None:
    engine = ScriptedEngine(endless, pause=0.01)
    with served(engine) as url:
        client = send(url, stream=stream, n=2)
        wait_until(lambda: len(engine.tickets) == 2 and (not stream or bool(client.recv(10))))
        assert engine.load_now().running == 2
        client.close()
        wait_until(lambda: engine.load_now().running == 0)
        assert {ticket.finish_reason for ticket in engine.tickets} == {"cancelled"}


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_is_logged_and_counted_as_such(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serving")
    engine = ScriptedEngine(endless, pause=0.01)
    with served(engine) as url:
        client = send(url, stream=stream)
        wait_until(lambda: len(engine.tickets) == 1 and (not stream or bool(client.recv(10))))
        client.close()
        body = socket.create_connection((urlsplit(url).hostname or "", urlsplit(url).port or 0))
        body.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{{".encode())
        body.close()
        wait_until(lambda: caplog.text.count(" 499 ") == 2)
        assert f"POST {CHAT} 499" in caplog.text and " 200 " not in caplog.text
        figures = httpx2.get(f"{url}/metrics").text
    assert f'path="{CHAT}",status="499"}} 2' in figures and 'status="200"' not in figures


def test_requests_that_follow_on_one_connection_without_waiting() -> None:
    """Answers come in the order of the requests; what is longer than its length is a request that is no HTTP."""
    engine = ScriptedEngine(lambda request: list("streamed"), pause=0.002)
    with served(engine) as url:
        one = {"model": "tiny", "messages": ASK, "stream": True}
        bodies = [json.dumps({**one, "model": model}).encode() for model in ("tiny", "tiny:poet", "none")]
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        with socket.create_connection((urlsplit(url).hostname or "", urlsplit(url).port or 0), timeout=5) as client:
            client.sendall(
                b"".join(head.encode() + b"%d\r\n\r\n" % len(body) + body for body in bodies) + b"{}\r\n\r\n"
            )
            received = b""
            while part := client.recv(65536):
                received += part
    texts = received.split(b"HTTP/1.1 ")[1:]
    assert [text[:3] for text in texts] == [b"200", b"200", b"404", b"400"]
    assert [text.count(b"[DONE]") for text in texts] == [1, 1, 0, 0] and b'"model":"tiny:poet"' in texts[1]
    assert engine.load_now().running == 0


def test_client_that_reads_nothing_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "READ_TIMEOUT", 0.2)
    engine = ScriptedEngine(lambda request: ["word " * 2000] * 100_000, pause=0.0005)
    with served(engine) as url:
        client = send(url, stream=True)
        wait_until(lambda: len(engine.tickets) == 1 and engine.load_now().running == 0, seconds=10)
        assert engine.tickets[0].finish_reason == "cancelled"
        client.close()


def test_many_streams_at_once() -> None:
    engine = ScriptedEngine(lambda request: list("streamed"), pause=0.002)

    async def one(client: AsyncOpenAI, number: int) -> str:
        messages: Any = [{"role": "user", "content": str(number)}]
        stream = await client.chat.completions.create(model="tiny", messages=messages, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them(url: str) -> list[str]:
        limits = httpx2.Limits(max_connections=None)
        async with (
            httpx2.AsyncClient(limits=limits) as http,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client,
        ):
            return await asyncio.gather(*(one(client, number) for number in range(60)))

    with served(engine) as url:
        assert asyncio.run(all_of_them(url)) == ["streamed"] * 60
        assert engine.load_now().running == 0


def test_engine_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """The client learns that it failed, the log what; in the middle of a stream, too."""
    engine = ScriptedEngine(lambda request: [])

    def fail(ticket: Any) -> None:
        ticket.deliver(engine_piece)
        ticket.fail(RuntimeError("/secret/path is full"))

    from serving.requests import Piece

    engine_piece = Piece("a")
    engine._answer = fail  # type: ignore[method-assign]
    with served(engine) as url, OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(InternalServerError, match="RuntimeError; its log") as caught:
            client.chat.completions.create(model="tiny", messages=ASK)
        assert "secret" not in str(caught.value) and "/secret/path is full" in caplog.text
        with pytest.raises(Exception, match="RuntimeError; its log"):
            list(client.chat.completions.create(model="tiny", messages=ASK, stream=True))


def test_texts_are_logged_only_on_request(caplog: pytest.LogCaptureFixture) -> None:
    from serving.api.settings import Settings

    caplog.set_level(logging.INFO, "serving")
    for settings, is_logged in ((Settings(), False), (Settings(log_requests=True), True)):
        caplog.clear()
        engine = ScriptedEngine(lambda request: ["the answer"])
        with served(engine, settings) as url, OpenAI(base_url=f"{url}/v1", api_key="x") as client:
            messages: Any = [{"role": "user", "content": "the question"}]
            client.chat.completions.create(model="tiny", messages=messages)
            list(client.completions.create(model="tiny", prompt="the question", stream=True))
        assert caplog.text.count("the question") == caplog.text.count("the answer") == 2 * is_logged
        assert f"POST {CHAT} 200" in caplog.text and "tokens" in caplog.text


def test_mutated_requests(caplog: pytest.LogCaptureFixture) -> None:
    """Each gets an answer or a refusal in OpenAI's form, and the server still answers afterwards."""
    family = Family("chatml-hybrid", thinking="block", tool_form=ScriptedEngine(endless).family.tool_form)
    engine = ScriptedEngine(lambda request: ["<think>", "a", "</think>\n\n{}"], family)
    statuses: dict[int, int] = {}
    with served(engine) as url, httpx2.Client(base_url=url, timeout=20) as client:
        for path, headers, body in mutated_requests(300, random.Random(0)):
            response = client.post(path, headers=headers, content=body)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            assert response.status_code != 500, (path, body)
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}, body
        wait_until(lambda: engine.load_now().running == 0)
    assert statuses[200] > 10 and statuses[400] > 100, statuses
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
    assert len(MUTATIONS) >= 6
