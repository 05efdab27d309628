"""A real engine under load: a minute of streams of 200 clients, some of which leave, and 2,000 mutated requests."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from typing import Any

import httpx2
import psutil
import pytest
from openai import AsyncOpenAI

from tests.fuzz_requests import mutated_requests
from tests.serving import load_engine
from tests.serving_api import served, wait_until

CLIENTS, SECONDS = 200, 60
MOST_GROWTH = 64 << 20  # bytes, from the first third of the time to its end


def memory() -> int:
    return int(psutil.Process().memory_info().rss)


async def use(client: AsyncOpenAI, number: int, end: float, ended: Counter[str]) -> None:
    """Ask again and again, and leave every fifth answer in its middle."""
    draw = random.Random(number)
    while time.monotonic() < end:
        stream = await client.chat.completions.create(
            model="tiny-qwen-small",
            messages=[{"role": "user", "content": "word " * draw.randint(1, 30)}],
            max_tokens=draw.randint(2, 40),
            stream=True,
            seed=number,
        )
        leaves = draw.random() < 0.2
        reason = None
        async for chunk in stream:
            reason = chunk.choices[0].finish_reason
            if leaves and chunk.choices[0].delta.content:
                break
        await stream.close()
        ended["left" if leaves else reason or "without a reason"] += 1


async def load(url: str, ended: Counter[str], sizes: list[int]) -> None:
    end = time.monotonic() + SECONDS

    async def watch() -> None:
        await asyncio.sleep(SECONDS / 3)
        sizes.append(memory())

    limits = httpx2.Limits(max_connections=None)
    async with (
        httpx2.AsyncClient(limits=limits, timeout=120) as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client,
    ):
        await asyncio.gather(watch(), *(use(client, number, end, ended) for number in range(CLIENTS)))


# httpx leaves generators of its own open where a client leaves a stream in its middle.
@pytest.mark.filterwarnings(
    r"ignore:.*async_generator object (Response|\w*Stream)\.:pytest.PytestUnraisableExceptionWarning"
)
def test_streams_and_mutated_requests(caplog: pytest.LogCaptureFixture) -> None:
    ended: Counter[str] = Counter()
    statuses: Counter[int] = Counter()
    sizes: list[int] = []
    engine: Any
    with load_engine(context_length=512) as engine, served(engine) as url:
        asyncio.run(load(url, ended, sizes))
        wait_until(lambda: engine.load_now().running == engine.load_now().waiting == 0, seconds=30)
        sizes.append(memory())
        with httpx2.Client(base_url=url, timeout=120) as client:
            for path, headers, body in mutated_requests(2000, random.Random(1), engine.model_name):
                response = client.post(path, headers=headers, content=body)
                statuses[response.status_code] += 1
                assert response.status_code == 200 or "message" in response.json()["error"], body
        wait_until(lambda: engine.load_now().running == engine.load_now().waiting == 0, seconds=30)
        sizes.append(memory())
    print(ended, statuses, [size >> 20 for size in sizes])
    assert sum(ended.values()) > CLIENTS and ended["left"] and not ended["without a reason"]
    assert statuses[200] > 100 and not statuses[500]
    assert max(sizes[1:]) - sizes[0] < MOST_GROWTH, sizes
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
