"""Requests with random faults, for a server that has to answer or refuse each: ``python -m tests.fuzz_requests``.

Usage: python -m tests.fuzz_requests URL MODEL [--count 2000] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

PATHS = ("/v1/chat/completions", "/v1/completions")
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
_SCHEMA = {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "number"}}}
_STRICT = {"type": "function", "function": {"name": "g", "strict": True, "parameters": _SCHEMA}}
_CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SEEDS: tuple[tuple[str, dict[str, Any]], ...] = (
    (PATHS[0], {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}),
    (
        PATHS[0],
        {
            "messages": [{"role": "developer", "content": "d"}, {"role": "user", "content": "Hi"}], "tools": [_STRICT],
            "tool_choice": {"type": "function", "function": {"name": "g"}}, "parallel_tool_calls": False, "n": 2,
            "max_tokens": 4, "user": "u", "store": False, "top_k": 3, "repetition_penalty": 1.1,
        },
    ),
    (
        PATHS[0],
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "JSON?"}]},
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "tool_call_id": "a", "content": "22"},
            ],
            "tools": [_TOOL], "tool_choice": "auto", "stream": True, "stream_options": {"include_usage": True},
            "n": 2, "logprobs": True, "top_logprobs": 3, "stop": ["x"], "max_tokens": 4, "seed": 1,
            "response_format": {"type": "json_object"}, "temperature": 0.5, "top_p": 0.9,
        },
    ),
    (
        PATHS[0],
        {
            "messages": [{"role": "user", "content": "Hi"}], "functions": [_TOOL["function"]], "function_call": "auto",
            "max_completion_tokens": 4, "chat_template_kwargs": {"enable_thinking": False},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        },
    ),
    (PATHS[1], {"prompt": ["a", "b"], "max_tokens": 4, "logprobs": 1, "stream": True, "n": 2}),
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**63, 2**64, 10**400, 1.5, 1e308, float("nan"), float("inf"), "", "x", "\ud800",
    "\x00", "<|im_end|>", "<|im_start|>system\n", "ä" * 3000, [], {}, [[]], [None], {"": None}, ["x"] * 50,
    {"type": "text"}, {"role": "assistant", "content": "x"}, {"$ref": "#"}, "../../etc/passwd", "none", "required", 3,
    [_TOOL], [_CALL],
)  # fmt: skip

Place = tuple[Any, Any]
Mutation = Callable[[dict[str, Any], random.Random], None]


def _places(value: Any) -> list[Place]:
    """Return every container of a value with each of its keys."""
    found: list[Place] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += [(value, key), *_places(inner)]
    return found


def _replace(body: dict[str, Any], draw: random.Random) -> None:
    container, key = draw.choice(_places(body))
    container[key] = deepcopy(draw.choice(_VALUES))


def _remove(body: dict[str, Any], draw: random.Random) -> None:
    container, key = draw.choice(_places(body))
    del container[key]


def _add(body: dict[str, Any], draw: random.Random) -> None:
    containers = [body, *(container[key] for container, key in _places(body) if isinstance(container[key], dict))]
    name = draw.choice(["x", "role", "content", "name", "stream", "\ud800", ""])
    draw.choice(containers)[name] = deepcopy(draw.choice(_VALUES))


def _repeat(body: dict[str, Any], draw: random.Random) -> None:
    lists = [container[key] for container, key in _places(body) if isinstance(container[key], list) and container[key]]
    if lists:
        found = draw.choice(lists)
        found.insert(draw.randrange(len(found) + 1), deepcopy(draw.choice(found)))


def _nest(body: dict[str, Any], draw: random.Random) -> None:
    container, key = draw.choice(_places(body))
    for _ in range(draw.choice([1, 5, 300])):
        container[key] = draw.choice([[container[key]], {"a": container[key]}])


def _swap(body: dict[str, Any], draw: random.Random) -> None:
    (first, one), (second, other) = draw.choice(_places(body)), draw.choice(_places(body))
    second[other], first[one] = deepcopy(first[one]), deepcopy(second[other])


MUTATIONS: tuple[Mutation, ...] = (_replace, _replace, _remove, _add, _repeat, _nest, _swap)


def mutated_requests(
    count: int, draw: random.Random, model: str = "tiny"
) -> Iterator[tuple[str, dict[str, str], bytes]]:
    """Yield address, headers and body of requests."""
    for _ in range(count):
        path, seed = draw.choice(SEEDS)
        body = {"model": model, **deepcopy(seed)}
        for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
            draw.choice(MUTATIONS)(body, draw)
        data = json.dumps(body, ensure_ascii=draw.random() < 0.7).encode("utf-8", "surrogatepass")
        if draw.random() < 0.1:  # bytes of the request itself
            place = draw.randrange(len(data))
            data = data[:place] + draw.choice([b"", b"\x00", b"\xff", b"}", b'"', data]) + data[place + 1 :]
        kind = draw.choice(["application/json"] * 20 + ["text/plain", "application/json; charset=latin-1", "x"])
        yield draw.choice([path] * 9 + list(PATHS)), {"Content-Type": kind}, data


def main(argv: Sequence[str]) -> int:
    """Send mutated requests to a server that runs; 1 if one of them is neither answered nor refused properly."""
    import httpx2

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_requests", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    statuses: Counter[int] = Counter()
    faults = 0
    with httpx2.Client(base_url=args.url, timeout=120) as client:
        for path, headers, body in mutated_requests(args.count, random.Random(args.seed), args.model):
            response = client.post(path, headers=headers, content=body)
            statuses[response.status_code] += 1
            is_form = response.status_code == 200 or set(response.json().get("error", ())) >= {"message", "type"}
            if response.status_code == 500 or not is_form:
                faults += 1
                print(f"{response.status_code} for {path} {body!r}: {response.text[:300]}", file=sys.stderr)
        load = client.get("/health").json()
    print(f"statuses: {dict(sorted(statuses.items()))}, faults: {faults}, afterwards: {load}")
    return 1 if faults or load["running"] or load["waiting"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
