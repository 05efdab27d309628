"""Strict functions: the official client's helpers work, and arguments that do not fit are an error, not an answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import APIError, BadRequestError, OpenAI, UnprocessableEntityError
from pydantic import BaseModel

from chat.detect import HERMES_FORMS
from chat.families import QWEN_V1, Family
from tests.serving_api import ScriptedEngine, served

HERMES = Family("chatml", tool_form=HERMES_FORMS[0])
ASK: Any = [{"role": "user", "content": "Weather in Ulm? As JSON."}]
GOOD, BAD = '{"city": "Ulm", "days": [{"number": 3}]}', '{"city": "Ulm", "days": [{"number": "three"}]}'


class Day(BaseModel):
    number: int


class Weather(BaseModel):
    """Return the weather."""

    city: str
    days: list[Day]


class Server:
    def __init__(self) -> None:
        self.text = ""
        self.engine = ScriptedEngine(lambda request: [self.text[n : n + 7] for n in range(0, len(self.text), 7)])

    def write(self, family: Family, arguments: str, name: str = "Weather") -> None:
        self.engine.family = family
        is_react = family is QWEN_V1
        call = f"\nAction: {name}\nAction Input: {arguments}\n" if is_react else f'{{"name": "{name}", "arguments": '
        self.text = call if is_react else f"<tool_call>\n{call}{arguments}}}\n</tool_call>"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    with served(found.engine) as url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        found.client = client  # type: ignore[attr-defined]
        yield found


def client_of(server: Server) -> OpenAI:
    client: OpenAI = server.client  # type: ignore[attr-defined]
    return client


@pytest.mark.parametrize("family", [HERMES, QWEN_V1])
def test_helpers_of_the_official_client(server: Server, family: Family) -> None:
    tools: Any = [openai.pydantic_function_tool(Weather)]
    server.write(family, GOOD)
    answer = client_of(server).chat.completions.parse(model="tiny", messages=ASK, tools=tools)
    call = (answer.choices[0].message.tool_calls or [])[0]
    assert call.function.parsed_arguments == Weather(city="Ulm", days=[Day(number=3)])
    assert "strict" not in server.engine.prompt_of() and "Return the weather." in server.engine.prompt_of()

    with client_of(server).chat.completions.stream(model="tiny", messages=ASK, tools=tools) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls" and final.message.tool_calls is not None
    assert final.message.tool_calls[0].function.parsed_arguments == call.function.parsed_arguments

    server.engine.family, server.text = HERMES, GOOD
    formed = client_of(server).chat.completions.parse(model="tiny", messages=ASK, response_format=Weather)
    assert formed.choices[0].message.parsed == Weather(city="Ulm", days=[Day(number=3)])


@pytest.mark.parametrize("family", [HERMES, QWEN_V1])
def test_arguments_that_do_not_fit(server: Server, family: Family) -> None:
    tools: Any = [openai.pydantic_function_tool(Weather)]
    fields: Any = {"model": "tiny", "messages": ASK, "tools": tools}
    create = client_of(server).chat.completions.create
    fault = r"call of Weather does not fit its parameters: \$.days\[0\].number: 'three' is not of type 'integer'"
    server.write(family, BAD)
    with pytest.raises(UnprocessableEntityError, match=fault) as caught:
        create(**fields)
    assert (caught.value.param, caught.value.code) == ("tools", "invalid_answer")
    with pytest.raises(APIError, match=fault):
        list(create(**fields, stream=True))
    tools[0]["function"]["strict"] = False
    assert create(**fields).choices[0].message.tool_calls[0].function.arguments.strip() == BAD
    # A call that the length cuts off is not checked, as an answer is not.
    tools[0]["function"]["strict"] = True
    assert create(**fields, max_tokens=8).choices[0].finish_reason == "length"


def test_only_the_strict_functions_are_checked(server: Server) -> None:
    tools: Any = [openai.pydantic_function_tool(Weather), {"type": "function", "function": {"name": "other"}}]
    server.write(HERMES, BAD, "other")
    answer = client_of(server).chat.completions.create(model="tiny", messages=ASK, tools=tools)
    assert (answer.choices[0].message.tool_calls or [])[0].function.name == "other"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        ({"strict": "yes"}, r'tools\[0\].function.strict: must be true or false, not "yes"'),
        ({"strict": True, "parameters": []}, r"tools\[0\].function.parameters: must be a JSON schema"),
        ({"strict": True, "parameters": {"type": "strange"}}, r"tools\[0\].function.parameters.type: .*not valid"),
        ({"strict": True, "parameters": {"properties": {"a": {"pattern": "(a+)+$"}}}}, "pattern is not supported"),
    ],
)
def test_what_cannot_be_checked_is_refused(server: Server, function: dict[str, Any], fault: str) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", **function}}]
    with pytest.raises(BadRequestError, match=fault):
        client_of(server).chat.completions.create(model="tiny", messages=ASK, tools=tools)
