"""A refusal names the parameter as OpenAI does, and shows its value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from serving.requests import RequestError, shown
from tests.serving import load_engine, write_checkpoint
from tests.serving_api import ScriptedEngine, served

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
JSON = {"Content-Type": "application/json"}
LONG = '{"seed": ' + "9" * 5000 + "}"  # an integer that Python does not convert
CHAT = "/v1/chat/completions"


SCHEMA = "response_format.json_schema.schema"


def with_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}


@pytest.fixture(scope="module", params=["qwen", "qwen3"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """The client of a real engine, with Qwen v1's tokenizer and a fast one."""
    folder = write_checkpoint(tmp_path_factory.mktemp("real") / "tiny", request.param)
    with load_engine(folder) as engine, served(engine) as url, httpx2.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    with served(ScriptedEngine(lambda request: ["a"])) as url, httpx2.Client(base_url=url) as client:
        yield client


def refusal(client: httpx2.Client, body: Any, path: str = CHAT) -> tuple[str | None, str]:
    """Return the parameter and the message of the error that a body is answered with."""
    text = body if isinstance(body, (str, bytes)) else json.dumps(body)
    response = client.post(path, content=text, headers=JSON)
    assert response.status_code == 400, response.text
    return response.json()["error"]["param"], response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": "hot"}, "temperature", 'temperature: must be a number, not "hot"'),
        ({"temperature": float("nan")}, "temperature", "temperature: must be a finite number, not NaN"),
        ({"temperature": -1}, "temperature", "temperature: must be a number from 0 to 100, not -1.0"),
        ({"n": 1.5}, "n", "n: must be an integer, not 1.5"),
        ({"n": 0}, "n", "n: must be at least 1, not 0"),
        ({"stream": "x" * 99}, "stream", f'stream: must be true or false, not "{"x" * 59}...'),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "not 1"),
        ({"stop": 3}, "stop", "stop: must be a string or a list, not 3"),
        ({"stop": ["a", 3]}, "stop[1]", "stop[1]: must be a string, not 3"),
        ({"tool_choice": 5}, "tool_choice", "must be 'none', 'auto' or 'required' or an object, not 5"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "tool_choice.function: is required"),
        ({"tool_choice": {"type": "x", "function": {"name": "f"}}}, "tool_choice.type", "must be 'function', not"),
        ({"chat_template_kwargs": {"preserve_thinking": True}}, "chat_template_kwargs.preserve_thinking", "loses"),
        ({"preserve_thinking": True}, "preserve_thinking", "/v1/chat/completions takes it in chat_template_kwargs"),
        ({"reasoning_effort": "low"}, "reasoning_effort", 'reasoning_effort: "low" is not possible'),
        ({"messages": None}, "messages", "messages: is required"),
        ({"top_k": 1 << 30}, "top_k", "top_k: must be a number from 0 to 1048576, not 1073741824"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is required for this type"),
        ({"messages": "x"}, "messages", 'messages: must be a list, not "x"'),
        ({"messages": [USER, "x"]}, "messages[1]", 'messages[1]: must be an object, not "x"'),
        ({"messages": [{**USER, "content": 5}]}, "messages[0].content", "a list of text parts, not 5"),
        ({"messages": [{**USER, "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", '"image_url"}'),
        ({"messages": [{**USER, "role": "robot"}]}, "messages[0].role", '"robot" is unknown'),
        ({"tools": [{**TOOL, "type": "x"}]}, "tools[0]", '"type": "x"'),
        ({"tools": [{"type": "function", "function": {"name": 3}}]}, "tools[0].function.name", "3 is not the name"),
        ({"functions": [{"name": "f"}, {"name": 3}]}, "functions[1].name", "functions[1].name: 3 is not the name"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call", "function_call: names a"),
        ({"functions": [{"name": "f", "strict": 1}]}, "functions[0].strict", "must be true or false, not 1"),
        ({"functions": [{"name": "f", "parameters": 5}]}, "functions[0].parameters", "an object or a list, not 5"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name", "requ"),
        ({"x" * 500: 1}, "x" * 200, "xxx"),
        (with_schema({"properties": {"a": {"type": "text"}}}), f"{SCHEMA}.properties.a.type", "'text' is not valid"),
        (with_schema({"anyOf": [{}, {"pattern": "x"}]}), f"{SCHEMA}.anyOf[1]", "the keyword pattern is not supported"),
    ],
)
def test_parameter_and_value(client: httpx2.Client, fields: dict[str, Any], param: str, message: str) -> None:
    found, text = refusal(client, {"model": "tiny", "messages": [USER], **fields})
    assert found == param and message in text, text


def test_missing_fields_and_other_bodies(client: httpx2.Client) -> None:
    assert refusal(client, {"messages": [USER]}) == ("model", "model: is required")
    assert refusal(client, {"model": "tiny"}, "/v1/completions") == ("prompt", "prompt: is required")
    assert refusal(client, '{"model": "tiny", x}') == (
        None, "the body is not JSON: Expecting property name enclosed in double quotes at character 18",
    )  # fmt: skip
    for body, reason in (
        (b'{"model": "\xff"}', "invalid start byte"),
        ("[" * 9999, "nested too deeply"),
        (LONG, "4300"),
    ):
        param, message = refusal(client, body)
        assert param is None and message.startswith("the body cannot be read: ") and reason in message
    for body in ("[]", "3", '"x"', "null", ""):
        param, message = refusal(client, body)
        assert param is None and "JSON" in message


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("text", ["\ud800", "\x00", "<|im_end|>", "\u202e", "𝕏" * 500])
def test_strange_characters_in_every_text(real: httpx2.Client, path: str, text: str) -> None:
    """A server answers or refuses them, and its answer is JSON."""
    call = {"id": text, "type": "function", "function": {"name": text, "arguments": text}}
    message = {"role": text, "content": text, "name": text, "tool_call_id": text, "reasoning_content": text}
    tool = {"type": text, "function": {"name": text, "description": text, "parameters": {text: text}, "strict": text}}
    forms = {"type": "json_schema", "json_schema": {"name": text, "schema": {"$ref": text, "const": text}}}
    values: dict[str, list[Any]] = {
        "messages": [[{**USER, "content": text}], [{**USER, "content": [{"type": text, "text": text}]}], [message],
                     [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": text}]],
        "tools": [[tool], [{**TOOL, "function": {**tool["function"], "strict": True}}]],
        "functions": [[tool["function"]]], "tool_choice": [text, {"type": "function", "function": {"name": text}}],
        "function_call": [text, {"name": text}], "response_format": [forms, {"type": text}], "stop": [text, [text]],
        "prompt": [text, [text, text]], "model": [text], "user": [text], text: [text], "seed": [text],
        "chat_template_kwargs": [{text: text}], "stream_options": [{text: text}],
    }  # fmt: skip
    for name, alternatives in values.items():
        for value in alternatives:
            body = {"model": "tiny", **({"messages": [USER]} if path == CHAT else {"prompt": "x"}), name: value}
            response = real.post(path, content=json.dumps({"max_tokens": 1, **body}), headers=JSON)
            assert response.status_code in (200, 400, 404), (body, response.text)
            assert response.status_code == 200 or response.json()["error"]["message"]


@pytest.mark.parametrize(
    "number", ["1e999", "-0", "1" + "0" * 400, "-1" + "0" * 4298, "9" * 4300, "9" * 4301, "1E-999"]
)
def test_strange_numbers_in_every_field(real: httpx2.Client, number: str) -> None:
    for name in (
        *("n", "seed", "top_p", "top_k", "temperature", "max_tokens", "max_completion_tokens", "presence_penalty"),
        *("frequency_penalty", "repetition_penalty", "top_logprobs", "logprobs", "stop", "messages", "tools", "model"),
    ):
        text = f'{{"model": "tiny", "max_tokens": 1, "messages": [{json.dumps(USER)}], "{name}": {number}}}'
        response = real.post(CHAT, content=text, headers=JSON)
        assert response.status_code in (200, 400), (name, response.text)
        assert len(response.text) < 1500
        listed = f'{{"model": "tiny", "max_tokens": 1, "prompt": ["a", "b", "c"], "{name}": {number}}}'
        assert real.post("/v1/completions", content=listed, headers=JSON).status_code in (200, 400), name


@pytest.mark.parametrize("depth", [100, 400, 700, 900, 2000, 100_000])
@pytest.mark.parametrize("place", ["content", "parameters", "schema", "arguments", "unknown"])
def test_deep_values(real: httpx2.Client, depth: int, place: str) -> None:
    for opening, end in (('{"a":', "}"), ("[", "]"), ('{"items":', "}")):
        deep = opening * depth + "{}" + end * depth
        content = deep if place == "content" else '"JSON"'
        function, schema = f'{{"name": "f", "parameters": {deep}}}', f'{{"name": "n", "schema": {deep}}}'
        added = {
            "parameters": f', "tools": [{{"type": "function", "function": {function}}}]',
            "schema": f', "response_format": {{"type": "json_schema", "json_schema": {schema}}}',
            "arguments": f', "functions": [{{"strict": true, {function[1:]}]',
            "unknown": f', "x": {deep}',
        }.get(place, "")
        message = f'{{"role": "user", "content": {content}}}'
        text = f'{{"model": "tiny", "max_tokens": 1, "messages": [{message}]{added}}}'
        response = real.post(CHAT, content=text, headers=JSON)
        assert response.status_code in (200, 400), response.text
        assert "error" not in response.json() or response.json()["error"]["type"] == "invalid_request_error"


def test_shown_values_are_short() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert shown(deep) == "[" * 60 + "..."
    assert shown({"a": [1, None, "ä"]}) == '{"a": [1, null, "ä"]}' and len(shown("x" * 1_000_000)) == 63
    assert shown(object).startswith('"<class')
    with pytest.raises(RequestError, match="top_p: must be a number from 0 to 1, not 2"):
        from serving.requests import Sampling

        Sampling(top_p=2)
