"""Who may ask, from which page, and with how large and slow a body."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import pytest

import serving.api.connection as connection
from serving.api.settings import Settings
from tests.serving_api import ScriptedEngine, served, wait_until

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]})
JSON = {"Content-Type": "application/json"}


def ask(
    url: str, path: str = CHAT, body: str | bytes | None = BODY, method: str = "POST", **headers: str
) -> tuple[int, Mapping[str, str], Any]:
    """Send a request and return status, headers and the error or the text."""
    client = HTTPConnection(urlsplit(url).netloc, timeout=10)
    try:
        client.request(
            method, path, body, {**JSON, **{name.replace("_", "-"): value for name, value in headers.items()}}
        )
        response = client.getresponse()
        text = response.read().decode()
    finally:
        client.close()
    value = json.loads(text) if response.headers.get_content_type() == "application/json" else text
    return response.status, response.headers, value.get("error", value) if isinstance(value, dict) else value


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(lambda request: ["Hello"])


@pytest.fixture(scope="module")
def url(engine: ScriptedEngine) -> Iterator[str]:
    with served(engine, Settings(most_body_bytes=2000, body_timeout=0.3, most_tokens=5)) as url:
        yield url


@pytest.fixture(scope="module")
def guarded(engine: ScriptedEngine) -> Iterator[str]:
    settings = Settings(api_key="secret", allowed_hosts=None, allowed_origins=("https://example.org",))
    with served(engine, settings) as url:
        yield url


def test_key(guarded: str) -> None:
    for wrong in (
        {},
        {"Authorization": "Bearer other"},
        {"Authorization": "secret"},
        {"Authorization": "Bearer sécret"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic secret"},
        {"Authorization": "Bearer " + "x" * 50_000},
    ):
        status, headers, error = ask(
            guarded, **{name: value.encode().decode("latin-1") for name, value in wrong.items()}
        )
        assert (status, error["code"], headers["WWW-Authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert ask(guarded, "/v1/models", None, "GET")[0] == ask(guarded, "/metrics", None, "GET")[0] == 401
    for right in ("Bearer secret", "bearer secret", "BEARER  secret "):
        assert ask(guarded, Authorization=right)[0] == 200
    # The page asks for the key; a load balancer has none.
    assert ask(guarded, "/health", None, "GET")[0] == ask(guarded, "/", None, "GET")[0] == 200


def test_other_names_of_this_machine(url: str, guarded: str) -> None:
    """A website whose name points at this machine does not get an answer, unless any name is allowed."""
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::1"):
        assert ask(url, Host=host)[2].get("code") == "host"
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
        assert ask(url, Host=host)[0] == 200
    assert ask(guarded, Host="any.example", Authorization="Bearer secret")[0] == 200


def test_pages_of_other_websites(url: str, guarded: str) -> None:
    for origin in ("https://evil.example", "null", f"{url}0", "http://localhost:1", "http://[", "", "x"):
        status, headers, error = ask(url, Origin=origin)
        assert (status, error["code"]) == (403, "origin") and "access-control-allow-origin" not in headers
    assert ask(url, Origin=url)[0] == 200
    preflight = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    status, headers, _ = ask(guarded, body=None, method="OPTIONS", **preflight)
    assert status == 200 and headers["access-control-allow-origin"] == "https://example.org"
    status, headers, _ = ask(guarded, Origin="https://example.org", Authorization="Bearer secret")
    assert status == 200 and headers["access-control-allow-origin"] == "https://example.org"
    # Forms of other websites can send text, but neither JSON nor a header of their own.
    assert ask(url, Content_Type="text/plain")[0] == 400


def test_large_bodies(url: str) -> None:
    assert ask(url, body=BODY + " " * 3000)[2]["code"] == "request_too_large"
    assert ask(url, body=BODY, Content_Length="99999999999")[0] == 413
    for length in ("9" * 25, "-1", "x", "1, 2"):
        assert ask(url, body=BODY, Content_Length=length)[0] == 400
    chunks = "".join(f"3e8\r\n{' ' * 1000}\r\n" for _ in range(5)) + "0\r\n\r\n"
    assert ask(url, body=chunks, Transfer_Encoding="chunked")[0] == 413


def test_slow_bodies(url: str, engine: ScriptedEngine) -> None:
    before = len(engine.requests)
    status, _, error = ask(url, body=BODY[:20], Content_Length="100")
    assert (status, error["code"]) == (408, "timeout") and len(engine.requests) == before


def test_connections_without_a_request_end(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT", 0.2)
    address = (urlsplit(url).hostname or "", urlsplit(url).port or 0)
    for start in (
        b"",
        b"POST / HT",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: ",
    ):
        with socket.create_connection(address, timeout=5) as client:
            client.sendall(start)
            if start.endswith(b"\r\n\r\n"):
                while b"}" not in client.recv(4096):
                    pass
                client.sendall(b"GET /he")
            try:
                while client.recv(4096):
                    pass
            except ConnectionResetError:
                pass


def test_what_is_no_http(url: str) -> None:
    with socket.create_connection((urlsplit(url).hostname or "", urlsplit(url).port or 0), timeout=5) as client:
        client.sendall(b"\x16\x03\x01 this is TLS\r\n\r\n")
        received = b""
        while part := client.recv(4096):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/v1/nothing", "GET", 404), ("/docs", "GET", 404), ("/../etc", "GET", 404)],
)
def test_unknown_addresses(url: str, path: str, method: str, status: int) -> None:
    found, _, error = ask(url, path, None, method)
    figures = ask(url, "/metrics", None, "GET")[2]
    assert 'path="other"' in figures and "nothing" not in figures and "etc" not in figures
    assert found == status and set(error) == {"message", "type", "param", "code"}


def test_refused_requests_are_counted_by_their_address(url: str) -> None:
    assert ask(url, CHAT, None, "GET")[0] == 405 and ask(url, CHAT, body="x" * 5000)[0] == 413
    assert ask(url, "/v1/models/tiny:x", None, "GET", Origin="https://other.example")[0] == 403
    figures = ask(url, "/metrics", None, "GET")[2]
    for path, status in ((CHAT, 405), (CHAT, 413), ("/v1/models/{name:path}", 403)):
        assert f'path="{path}",status="{status}"' in figures


@pytest.mark.parametrize("body", ["", "{", "[]", "3", "null", b"\xff\xfe", "[" * 1500, '{"a":' + "9" * 1900 + "}"])
def test_bodies_that_are_no_objects(url: str, body: str | bytes) -> None:
    status, _, error = ask(url, body=body)
    assert status == 400 and error["type"] == "invalid_request_error"


def test_answers_longer_than_the_servers_limit(url: str, engine: ScriptedEngine) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    assert ask(url, body=json.dumps({**body, "max_tokens": 6}))[2]["param"] == "max_tokens"
    assert ask(url, body=json.dumps({**body, "max_completion_tokens": 6}))[2]["param"] == "max_completion_tokens"
    assert ask(url, body=json.dumps(body))[0] == 200 and engine.requests[-1].sampling.max_tokens == 5


def test_prompts_longer_than_the_context(url: str, engine: ScriptedEngine) -> None:
    engine.context_length = 3
    status, _, error = ask(url)
    engine.context_length = 100_000
    assert (status, error["param"]) == (400, "messages")


def test_full_queue_and_closed_engine() -> None:
    engine = ScriptedEngine(lambda request: ["a"], places=0)
    with served(engine) as url:
        status, headers, error = ask(url)
        assert (status, headers["Retry-After"], error["type"]) == (429, "1", "rate_limit_error")
        engine.close()
        status, headers, error = ask(url)
        assert (status, headers["Retry-After"], error["code"]) == (503, "5", "closing")
    wait_until(lambda: engine.is_closed)
