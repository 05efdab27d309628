"""A model that was tuned on calls makes them over HTTP: parsed, streamed, forced or not, and their results told."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from benchmarks.server_process import server_process
from benchmarks.vllm_models import TOOL, calls, chat_template
from tests.nightly.training import tune

# Checked by the server; the model reads the same description.
STRICT = {**TOOL, "function": {**TOOL["function"], "strict": True}}
SECONDS = 120.0  # that an answer may take
LEAST = 0.75  # share of what was taught that is said to the letter
LORA = ("--use_lora", "--lora_r", 16, "--lora_alpha", 32, "--learning_rate", "1e-3")


@pytest.fixture(scope="module")
def client(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """The official client of a server with an adapter that was tuned on calls, their results and the answers."""
    work = tmp_path_factory.mktemp("calls")
    model, data = work / "model", work / "calls.json"
    shutil.copytree(small_model, model)
    (model / "chat_template.jinja").write_text(chat_template(), encoding="utf-8")
    records = [{"messages": [*question, *following], "tools": [TOOL]} for question, following in calls()]
    data.write_text(json.dumps(records), encoding="utf-8")
    adapter = tune(model, data, work / "adapter", *LORA, steps=12)  # knows them by then
    command = [
        sys.executable,
        "-m",
        "scripts.serve",
        "--model_name_or_path",
        str(model),
        "--adapter",
        f"tuned={adapter}",
    ]
    with server_process(command, {}) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=SECONDS) as client:
            yield client


def ask(client: OpenAI, messages: list[dict[str, Any]], **fields: Any) -> Any:
    asked: Any = {"model": "tuned", "messages": messages, "tools": [STRICT], "temperature": 0, "max_tokens": 60}
    return client.chat.completions.create(**asked, **fields, extra_body={"repetition_penalty": 1})


def called(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def test_calls_are_parsed_and_their_results_told(client: OpenAI) -> None:
    right: dict[str, list[bool]] = {"calls": [], "answers": []}
    for question, (taught, result, answer) in calls():
        choice = ask(client, question).choices[0]
        town = json.loads(taught["tool_calls"][0]["function"]["arguments"])
        right["calls"].append(
            called(choice.message) == [("get_weather", town)] and choice.finish_reason == "tool_calls"
        )
        if choice.message.tool_calls:
            call = choice.message.tool_calls[0]
            history = [*question, choice.message.model_dump(exclude_none=True), {**result, "tool_call_id": call.id}]
            told = ask(client, history).choices[0]
            right["answers"].append((told.message.content, told.finish_reason) == (answer["content"], "stop"))
    print(right)
    assert len(right["answers"]) >= LEAST * len(right["calls"])
    for name, found in right.items():
        assert sum(found) >= LEAST * len(found), name


def test_streamed_call_is_that_of_the_whole_answer(client: OpenAI) -> None:
    question = calls()[0][0]
    whole = ask(client, question).choices[0].message
    chunks = list(ask(client, question, stream=True))
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert pieces[0].id and {piece.index for piece in pieces} == {0}
    text = "".join(piece.function.arguments or "" for piece in pieces)
    assert [(pieces[0].function.name, json.loads(text))] == called(whole)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}, "none"])
def test_choice_of_tools_decides_whether_one_is_called(client: OpenAI, choice: Any) -> None:
    """Also for a question that needs none, and for one that was taught with a call."""
    for text in ("Name three colours.", calls()[1][0][0]["content"]):
        found = ask(client, [{"role": "user", "content": text}], tool_choice=choice).choices[0]
        if choice == "none":
            assert found.message.content and not found.message.tool_calls
        else:
            [(name, arguments)] = called(found.message)
            assert name == "get_weather" and set(arguments) == {"town"} and found.finish_reason == "tool_calls"
