"""What every request passes before it is read: who may ask from where, and how large and slow its body may be."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.errors import ApiError, api_error
from serving.api.metrics import Metrics
from serving.api.settings import Settings

_LOG = logging.getLogger("serving.requests")
_CLOSE = {"Connection": "close"}  # the rest of the body is not read
_LONGEST_METHOD = 10  # characters that are logged
CLIENT_LEFT = 499
"""Status of a request whose client left before the end of its answer, in the log and in figures (nginx's number)."""


class Gate:
    """Middleware that refuses, counts and logs requests.

    Args:
        open_paths: prefixes of addresses that need no key.
        path_of: returns the address of the server that a request is for; never what a client made up.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        open_paths: tuple[str, ...],
        path_of: Callable[[Scope], str],
    ) -> None:
        self._app, self._settings, self._metrics, self._open_paths = app, settings, metrics, open_paths
        self._path_of = path_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, exchange = time.monotonic(), _Exchange(receive, send)
        try:
            self._check(scope)
            body = await self._read_body(scope, exchange.receive)
            await self._app(scope, _replay(body, exchange.receive), exchange.send)
        except _Disconnected:
            return
        except Exception as error:
            if exchange.status:
                raise
            await api_error(error).response(_CLOSE)(scope, exchange.receive, exchange.send)
        finally:
            status = exchange.status
            route = self._path_of(scope)
            seconds = time.monotonic() - started
            self._metrics.count_request(route, status)
            if route.startswith("/v1/"):
                self._metrics.duration.observe(seconds)
            method = scope["method"][:_LONGEST_METHOD]
            _LOG.info("%s %s %d %.2f s%s", method, route, status, seconds, scope.get("note", ""))

    def _check(self, scope: Scope) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        allowed = self._settings.allowed_hosts
        if allowed is not None and _host_name(host) not in allowed:
            raise ApiError(403, "the Host header does not name this server; --allowed_host allows a name", code="host")
        if origin not in (None, *self._settings.allowed_origins, f"http://{host}", f"https://{host}"):
            raise ApiError(403, "pages of other websites may not ask; --allow_origin allows one", code="origin")
        if (
            self._settings.api_key is not None
            and not scope["path"].startswith(self._open_paths)
            and scope["path"] != "/"
        ):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # Compared in constant time, whatever its length.
            is_same = hmac.compare_digest(_digest(given.strip()), _digest(self._settings.api_key))
            if scheme.lower() != "bearer" or not is_same:
                raise ApiError(
                    401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key"
                )

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        most = self._settings.most_body_bytes
        too_large = ApiError(413, f"the request is larger than {most:,} bytes", code="request_too_large")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > most:
            raise too_large
        try:
            return await asyncio.wait_for(_joined(receive, most), self._settings.body_timeout)
        except asyncio.TimeoutError:
            what = f"the body did not arrive in {self._settings.body_timeout:g} seconds"
            raise ApiError(408, what, code="timeout") from None
        except OverflowError:
            raise too_large from None


class _Exchange:
    """A request and its response, as far as they have come.

    Attributes:
        status: of the response; 0 before it; 499 if the client left before its end.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._is_complete = False
        self.status = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._is_complete:
            self.status = CLIENT_LEFT
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and self.status != CLIENT_LEFT:
            self.status = message["status"]
        self._is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)


class _Disconnected(Exception):
    """The client left before its request was complete."""


async def _joined(receive: Receive, most: int) -> bytes:
    """Return a body; ``OverflowError`` if it is longer than ``most`` bytes."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Disconnected
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > most:
            raise OverflowError
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives the whole body, then what follows."""
    messages: Iterable[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replayed() -> Message:
        for message in messages:
            return message
        return await receive()

    return replayed


def _digest(text: str) -> bytes:
    return hmac.digest(b"key", text.encode(), "sha256")


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
