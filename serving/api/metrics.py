"""Figures of a server in the text format of Prometheus."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

from serving.requests import Load

_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Counts of durations, in seconds."""

    def __init__(self, name: str, help_text: str) -> None:
        self._name, self._help = name, help_text
        self._counts = [0] * len(_BOUNDS)
        self._count, self._sum = 0, 0.0
        self._lock = threading.Lock()

    def observe(self, seconds: float) -> None:
        with self._lock:
            self._count += 1
            self._sum += seconds
            for index, bound in enumerate(_BOUNDS):
                self._counts[index] += seconds <= bound

    def lines(self) -> Iterator[str]:
        yield from _heading(self._name, "histogram", self._help)
        for bound, count in zip(_BOUNDS, self._counts, strict=True):
            yield f'{self._name}_bucket{{le="{bound:g}"}} {count}'
        yield f'{self._name}_bucket{{le="+Inf"}} {self._count}'
        yield f"{self._name}_sum {self._sum:.6f}"
        yield f"{self._name}_count {self._count}"


class Metrics:
    """Figures of the requests so far."""

    def __init__(self) -> None:
        self.first_token = Histogram("qwen_first_token_seconds", "From the arrival of a request to its first token.")
        self.duration = Histogram("qwen_request_seconds", "From the arrival of a request to the end of its answer.")
        self._requests: Counter[tuple[str, int]] = Counter()

    def count_request(self, path: str, status: int) -> None:
        """Count an answered or refused request.

        Args:
            path: an address of the server; never what a client made up.
        """
        self._requests[path, status] += 1

    def text(self, load: Load) -> str:
        """Return all figures, with those of the engine."""
        lines = [*_heading("qwen_requests_total", "counter", "Requests by address and HTTP status.")]
        for (path, status), count in sorted(self._requests.items()):
            lines.append(f'qwen_requests_total{{path="{path}",status="{status}"}} {count}')
        lines += [
            *_value("qwen_requests_running", "gauge", "Requests that are being answered.", load.running),
            *_value("qwen_requests_waiting", "gauge", "Requests in the queue.", load.waiting),
            *_value("qwen_prompt_tokens_total", "counter", "Tokens of prompts.", load.prompt_tokens),
            *_value("qwen_completion_tokens_total", "counter", "Tokens of answers.", load.completion_tokens),
            *self.first_token.lines(),
            *self.duration.lines(),
        ]
        return "\n".join(lines) + "\n"


def _heading(name: str, kind: str, help_text: str) -> tuple[str, str]:
    return f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"


def _value(name: str, kind: str, help_text: str, value: int) -> tuple[str, ...]:
    return *_heading(name, kind, help_text), f"{name} {value}"
