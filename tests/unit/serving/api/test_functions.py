"""Function calling as Qwen v1's API server has it, in the old form and in that of tools, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from chat.families import QWEN_V1
from tests.golden import Golden
from tests.serving_api import ScriptedEngine, served


class Scripted:
    """The official client of a server whose model writes ``script``, cut into pieces of three characters."""

    def __init__(self) -> None:
        self.script = ""
        self.engine = ScriptedEngine(lambda request: [self.script[n : n + 3] for n in range(0, len(self.script), 3)])

    def ask(self, script: str, **fields: Any) -> Any:
        self.script = script
        return self.client.chat.completions.create(model="tiny", **fields)

    def message(self, script: str, stream: bool, **fields: Any) -> tuple[dict[str, Any], str]:
        """Return a message, put together from a stream if there is one, and why it ended."""
        if not stream:
            choice = self.ask(script, **fields).choices[0]
            return choice.message.model_dump(exclude_none=True), choice.finish_reason
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        reason = ""
        for chunk in self.ask(script, stream=True, **fields):
            delta = chunk.choices[0].delta
            message["content"] += delta.content or ""
            if delta.function_call is not None:
                call = message.setdefault("function_call", {"name": "", "arguments": ""})
                call["name"] += delta.function_call.name or ""
                call["arguments"] += delta.function_call.arguments or ""
            for part in delta.tool_calls or []:
                if part.id:
                    function = {"name": part.function.name, "arguments": ""}
                    message.setdefault("tool_calls", []).append(
                        {"id": part.id, "type": "function", "function": function}
                    )
                message["tool_calls"][part.index]["function"]["arguments"] += part.function.arguments
            reason = chunk.choices[0].finish_reason or reason
        return message, reason


@pytest.fixture(scope="module")
def server() -> Iterator[Scripted]:
    scripted = Scripted()
    with served(scripted.engine) as url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        scripted.client = client  # type: ignore[attr-defined]
        yield scripted


def example(golden: Golden) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the messages and the functions of the original's example: its longest conversation with a call."""
    cases = [case for case in golden.load_json("react.json")["parse_messages"] if case["functions"]]
    called = [case for case in cases if any(turn.get("function_call") for turn in case["messages"])]
    case = max(called, key=lambda case: (len(case["messages"]), case["messages"][0]["content"] == "你好"))
    return case["messages"], case["functions"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", ["functions", "tools"])
def test_the_originals_example(server: Scripted, any_golden: Golden, stream: bool, form: str) -> None:
    """Every answer of the example: a greeting, a call, the answer after its result, a call for the next question."""
    recorded, functions = example(any_golden)
    offered: dict[str, Any] = {"functions": functions}
    if form == "tools":
        named = [{**function, "name": function.get("name") or function["name_for_model"]} for function in functions]
        offered = {"tools": [{"type": "function", "function": function} for function in named]}
    messages: list[dict[str, Any]] = []
    for turn in recorded:
        if turn["role"] == "function":
            calls = messages[-1].get("tool_calls")
            result = (
                {"role": "function", "name": "f"} if calls is None else {"role": "tool", "tool_call_id": calls[0]["id"]}
            )
            messages.append({**result, "content": turn["content"]})
        elif turn["role"] == "user":
            messages.append(turn)
        else:
            call, content = turn.get("function_call"), turn["content"] or ""
            conclusion = "Thought: I now know the final answer.\nFinal Answer: "
            script = f"{conclusion}{content}"
            if call:
                script = f"Thought: {content}\nAction: {call['name']}\nAction Input: {call['arguments']}\n"
            if messages[-1]["role"] in ("function", "tool"):
                script = script.removeprefix("Thought:")
            message, reason = server.message(script, stream, messages=messages, **offered)
            assert (message["role"], message.get("content") or "") == ("assistant", content)
            if call is None:
                assert reason == "stop" and not {"function_call", "tool_calls"} & set(message)
            elif form == "functions":
                assert (reason, message["function_call"]) == ("function_call", call)
            else:
                assert (reason, message["tool_calls"][0]["function"]) == ("tool_calls", call)
            messages.append(message)
    server.message("x", stream, messages=messages, **offered)
    called = next(turn for turn in recorded if turn.get("function_call"))["function_call"]
    assert f"Action: {called['name']}\nAction Input: {called['arguments']}\nObservation: " in server.engine.prompt_of()
    assert "\nObservation:" in server.engine.requests[-1].sampling.stop


@pytest.mark.parametrize("stream", [False, True])
def test_every_recorded_answer(server: Scripted, any_golden: Golden, stream: bool) -> None:
    repaired = (
        "observation before input",
        "empty action name",
        "two final answers",
    )  # see the tests of chat/reading.py
    functions = [{"name": "f", "parameters": {}}]
    question = [{"role": "user", "content": "?"}]
    for case in any_golden.load_json("react.json")["parse_response"]:
        if case["tag"] in repaired:
            continue
        message, reason = server.message(case["response"], stream, messages=question, functions=functions)
        assert (message.get("content") or "", reason) == (case["content"], case["finish_reason"]), case["tag"]
        assert message.get("function_call") == case["function_call"], case["tag"]


def test_requests_that_the_original_refuses(server: Scripted, any_golden: Golden) -> None:
    tags = ("function role first", "function after user")
    for case in any_golden.load_json("react.json")["parse_messages"]:
        if case["tag"] in tags:
            with pytest.raises(BadRequestError, match="does not follow a function_call"):
                server.ask("x", messages=case["messages"], functions=case["functions"] or [])
    call = {"name": "f", "arguments": "{}"}
    both = {
        "role": "assistant",
        "function_call": call,
        "tool_calls": [{"id": "a", "type": "function", "function": call}],
    }
    with pytest.raises(BadRequestError, match="Keep one of them"):
        server.ask("x", messages=[{"role": "user", "content": "?"}, both])
    with pytest.raises(BadRequestError, match="older form"):
        tool = {"type": "function", "function": {"name": "f"}}
        server.ask("x", messages=[{"role": "user", "content": "?"}], functions=[{"name": "f"}], tools=[tool])


def test_choice_of_a_function(server: Scripted) -> None:
    question, functions = [{"role": "user", "content": "?"}], [{"name": "f", "parameters": {}}]
    message, _ = server.message(" {}", False, messages=question, functions=functions, function_call={"name": "f"})
    assert message["function_call"] == {"name": "f", "arguments": "{}"}
    assert server.engine.prompt_of().endswith("<|im_start|>assistant\nThought:\nAction: f\nAction Input:")
    server.ask("x", messages=question, functions=functions, function_call="none")
    assert "following APIs" not in server.engine.prompt_of() and server.engine.family is QWEN_V1
    assert json.loads(message["function_call"]["arguments"]) == {}
