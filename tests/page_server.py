"""A server for the page without a model: it answers what a test tells it to, byte by byte if need be."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from serving.page import page_files

Step = bytes | threading.Event


def event(**delta: Any) -> bytes:
    """Return a chunk of a streamed answer."""
    return sse({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


def finish(reason: str = "stop", tokens: int = 7, **more: str) -> bytes:
    last = sse({"choices": [{"index": 0, "delta": {}, "finish_reason": reason, **more}]})
    return last + sse({"choices": [], "usage": {"completion_tokens": tokens}}) + b"data: [DONE]\n\n"


def sse(chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


def said(*texts: str) -> list[Step]:
    """Return the steps of an answer in so many pieces."""
    return [*(event(content=text) for text in texts), finish()]


class PageServer(ThreadingHTTPServer):
    """``answers`` are taken in turn, the last one again and again; ``requests`` are the bodies that came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models = ["tiny"]
        self.has_thinking = False
        self.key = ""
        self.answers: deque[Iterable[Step]] = deque()
        self.refusals: deque[tuple[int, str]] = deque()
        self.requests: list[dict[str, Any]] = []
        self.left = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def answer(self, *answers: Iterable[Step]) -> None:
        self.answers = deque(answers)
        self.requests.clear()
        self.left.clear()


@contextmanager
def serve_page() -> Iterator[PageServer]:
    with PageServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body would wait 40 ms until the browser has confirmed the head

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            if self._is_allowed():
                known = {"has_thinking": self.server.has_thinking}
                self._json(200, {"object": "list", "data": [{"id": name, **known} for name in self.server.models]})
        elif (file := page_files().get(self.path)) is not None:
            self._send(200, file.body, file.headers)
        else:
            self._json(404, {"error": {"message": f"{self.path} does not exist"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._is_allowed():
            return
        self.server.requests.append(body)
        if self.server.refusals:
            status, message = self.server.refusals.popleft()
            self._json(status, {"error": {"message": message}})
            return
        if body["model"] not in self.server.models:
            self._json(404, {"error": {"message": f"{body['model']} is not loaded", "code": "model_not_found"}})
            return
        answers = self.server.answers
        steps = answers.popleft() if len(answers) > 1 else answers[0]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        self._stream(steps)

    def _stream(self, steps: Iterable[Step]) -> None:
        try:
            for step in steps:
                if isinstance(step, bytes):
                    self.wfile.write(step)
                    continue
                # A comment line now and then shows whether the client is still there.
                while not step.wait(0.02):
                    self.wfile.write(b":\n\n")
        except OSError:
            self.server.left.set()

    def _is_allowed(self) -> bool:
        if self.server.key and self.headers.get("authorization") != f"Bearer {self.server.key}":
            self._json(401, {"error": {"message": "wrong key"}})
            return False
        return True

    def _json(self, status: int, body: object) -> None:
        self._send(status, json.dumps(body).encode(), {"content-type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
