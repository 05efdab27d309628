"""Plain texts that the model continues, the models there are, and the figures of a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import APIError, BadRequestError, OpenAI
from openai.types import Completion

from serving.api.settings import Settings
from tests.serving_api import ScriptedEngine, served


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(lambda request: [" to", " be", " é"])


@pytest.fixture(scope="module")
def client(engine: ScriptedEngine) -> Iterator[OpenAI]:
    with served(engine) as url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_continuation_and_its_stream(client: OpenAI, engine: ScriptedEngine) -> None:
    whole = client.completions.create(model="tiny", prompt="<|im_start|>", seed=3)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (" to be é", "stop")
    # Without a chat format, and control tokens stay text.
    assert engine.prompt_of() == "<|im_start|>" and len(engine.requests[-1].prompt_ids) == len("<|im_start|>")
    assert engine.requests[-1].sampling.max_tokens == 16
    chunks = list(
        client.completions.create(model="tiny", prompt="x", stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == " to be é"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 3
    assert chunks[-2].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(("most", "expected"), [(8, 8), (30, 16)])
def test_default_length_is_within_the_servers_limit(most: int, expected: int) -> None:
    engine = ScriptedEngine(lambda request: ["a"])
    with served(engine, Settings(most_tokens=most)) as url, OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        client.completions.create(model="tiny", prompt="x")
    assert engine.requests[-1].sampling.max_tokens == expected


def test_several_texts_and_their_logprobs(client: OpenAI) -> None:
    answers: Completion = client.completions.create(
        model="tiny", prompt=["a", "bc"], n=2, logprobs=2, max_tokens=2, seed=1
    )
    assert [(choice.index, choice.text, choice.finish_reason) for choice in answers.choices] == [
        (index, " to be", "length") for index in range(4)
    ]
    assert answers.usage is not None and (answers.usage.prompt_tokens, answers.usage.completion_tokens) == (3, 8)
    found = answers.choices[0].logprobs
    assert found is not None and found.tokens == [" to", " be"] and found.text_offset == [0, 3]
    assert found.token_logprobs == [-0.5, -0.5] and found.top_logprobs is not None and len(found.top_logprobs) == 2


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"prompt": []}, "prompt: is empty"),
        ({"prompt": [1, 2]}, "prompt"),  # ids could be those of control tokens
        ({"echo": True}, "echo: is not supported"),
        ({"suffix": "x"}, "suffix: is not supported"),
        ({"best_of": 2}, "best_of: is not supported"),
        ({"prompt": ["x"] * 17}, "16 answers"),
    ],
)
def test_what_is_not_supported_is_refused(client: OpenAI, fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(BadRequestError, match=fault):
        client.completions.create(**{"model": "tiny", "prompt": "x", **fields})


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:poet"]
    assert client.models.retrieve("tiny:poet").id == "tiny:poet"
    with pytest.raises(APIError, match="not loaded"):
        client.models.retrieve("../../etc/passwd")


def test_figures_and_health(client: OpenAI) -> None:
    client.completions.create(model="tiny", prompt="x")
    root = str(client.base_url).removesuffix("/v1/")
    health = client.get(f"{root}/health", cast_to=object)
    assert health == {"status": "ok", "running": 0, "waiting": 0}
    text = client.get(f"{root}/metrics", cast_to=str)
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(lines['qwen_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert lines["qwen_first_token_seconds_count"] != "0" and lines["qwen_requests_running"] == "0"
    assert lines['qwen_request_seconds_bucket{le="+Inf"}'] == lines["qwen_request_seconds_count"]
