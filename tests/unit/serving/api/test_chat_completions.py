"""Chats with the official client: answers, calls, thinking, streams, and formats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI, UnprocessableEntityError

from chat.detect import HERMES_FORMS
from chat.families import QWEN_V1, Family
from chat.tools_xml import XML_FORMS
from tests.serving_api import ScriptedEngine, served

HERMES = Family("chatml", tool_form=HERMES_FORMS[0])
THINKS = Family("chatml-hybrid", thinking="block", tool_form=HERMES_FORMS[2])
TAGGED = Family("chatml-3.5", thinking="blocks", prompt_suffix="<think>\n", is_strict=True, tool_form=XML_FORMS[1])
ASK = [{"role": "user", "content": "Weather in Ulm? Answer in JSON."}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


class Served:
    """A scripted engine behind the official client."""

    def __init__(self, url: str, engine: ScriptedEngine) -> None:
        self.engine = engine
        self.client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.script: list[str] = []

    def ask(self, script: list[str], family: Family = HERMES, **fields: Any) -> Any:
        self.script, self.engine.family = script, family
        body = {"model": "tiny", "messages": ASK, **fields}
        return self.client.chat.completions.create(**body)

    def stream(self, script: list[str], family: Family = HERMES, **fields: Any) -> list[Any]:
        return list(self.ask(script, family, stream=True, **fields))


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    engine = ScriptedEngine(lambda request: found.script)
    with served(engine) as url:
        found = Served(url, engine)
        yield found
        found.client.close()


def joined(chunks: list[Any], name: str = "content") -> str:
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    return "".join(getattr(delta, name, None) or "" for delta in deltas)


def test_answer_and_its_stream_are_equal(server: Served) -> None:
    whole = server.ask(["It ", "is 22", " °C."])
    choice = whole.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "It is 22 °C.", "stop")
    assert (whole.object, whole.model, whole.usage.completion_tokens) == ("chat.completion", "tiny", 3)
    assert whole.usage.prompt_tokens == len(server.engine.requests[-1].prompt_ids)

    chunks = server.stream(["It ", "is 22", " °C."], stream_options={"include_usage": True})
    assert joined(chunks) == "It is 22 °C." and chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert server.stream(["a"])[-1].choices[0].finish_reason == "stop"  # no usage where none was asked for


def test_sampling_reaches_the_engine(server: Served) -> None:
    server.ask(
        ["a"], temperature=0.5, top_p=0.9, seed=7, stop=["x", "y"], max_completion_tokens=9, presence_penalty=0.5,
        frequency_penalty=-1, extra_body={"top_k": 5, "repetition_penalty": 1.1, "min_p": 0.0},
    )  # fmt: skip
    sampling = server.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.stop) == (0.5, 0.9, 7, ("x", "y"))
    assert (sampling.max_tokens, sampling.top_k, sampling.repetition_penalty) == (9, 5, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logprobs) == (0.5, -1, None)
    server.ask(["a"], stop="x", max_tokens=3, model="tiny:poet", extra_body={"top_k": -1})
    assert server.engine.requests[-1].sampling.top_k == 0
    assert server.engine.requests[-1].sampling.stop == ("x",) and server.engine.requests[-1].adapter == "poet"


def test_several_answers_have_seeds_of_their_own(server: Served) -> None:
    before = len(server.engine.requests)
    answers = server.ask(["a", "b"], n=3, seed=5)
    assert [choice.index for choice in answers.choices] == [0, 1, 2] and answers.usage.completion_tokens == 6
    assert [request.sampling.seed for request in server.engine.requests[before:]] == [5, 6, 7]
    chunks = server.stream(["a", "b"], n=2)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["ab", "ab"]


def test_length_is_the_reason_of_a_cut_answer(server: Served) -> None:
    choice = server.ask(["a", "b", "c"], max_tokens=2).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("ab", "length")


def test_logprobs(server: Served) -> None:
    tokens = server.ask(["a", "é"], logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [(token.token, token.bytes, len(token.top_logprobs)) for token in tokens] == [
        ("a", [97], 2),
        ("é", [195, 169], 2),
    ]
    chunks = server.stream(["a", "b"], logprobs=True)
    found = [token.token for chunk in chunks if (probs := chunk.choices[0].logprobs) for token in probs.content]
    assert found == ["a", "b"]
    # Tokens whose text is held back come with the end: of a call that is incomplete, too.
    for script in (["a", "<tool_", "call>\n", "{"], ["a", "\n", CALL], ["a", "<"]):
        whole = server.ask(script, tools=[TOOL], logprobs=True).choices[0].logprobs.content
        chunks = server.stream(script, tools=[TOOL], logprobs=True)
        found = [token.token for chunk in chunks if (probs := chunk.choices[0].logprobs) for token in probs.content]
        assert found == [token.token for token in whole] == script


# ------------------------------------------------------------------------------------------------------------- tools


def test_call_of_a_tool(server: Served) -> None:
    choice = server.ask(["Let me look.\n", CALL[:20], CALL[20:]], tools=[TOOL]).choices[0]
    call = choice.message.tool_calls[0]
    assert (choice.finish_reason, choice.message.content, call.type) == ("tool_calls", "Let me look.", "function")
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Ulm"})

    chunks = server.stream(["Let me look.\n", CALL[:20], CALL[20:]], tools=[TOOL])
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert pieces[0].id and pieces[0].function.name == "weather" and {piece.index for piece in pieces} == {0}
    assert "".join(piece.function.arguments for piece in pieces) == '{"city": "Ulm"}'
    assert joined(chunks) == "Let me look." and chunks[-1].choices[0].finish_reason == "tool_calls"

    # The result goes back, and a plain answer comes.
    history = [*ASK, choice.message.model_dump(exclude_none=True)]
    history.append({"role": "tool", "tool_call_id": call.id, "content": "22"})
    assert server.ask(["22 °C."], tools=[TOOL], messages=history).choices[0].message.content == "22 °C."
    assert "<tool_response>\n22\n</tool_response>" in server.engine.prompt_of()


def test_calls_in_parallel_or_one(server: Served) -> None:
    assert len(server.ask([CALL, "\n", CALL], tools=[TOOL]).choices[0].message.tool_calls) == 2
    one = server.ask([CALL, "\n", CALL, "x"], tools=[TOOL], parallel_tool_calls=False).choices[0]
    assert len(one.message.tool_calls) == 1 and one.finish_reason == "tool_calls"


@pytest.mark.parametrize("family", [HERMES, THINKS, QWEN_V1])
def test_tool_choice(server: Served, family: Family) -> None:
    """The prompt opens the call that has to be made; without tools the model does not learn of them."""
    rest = ' {"city": "Ulm"}' if family is QWEN_V1 else ' {"city": "Ulm"}}\n</tool_call>'
    named = {"type": "function", "function": {"name": "weather"}}
    call = server.ask([rest], family, tools=[TOOL], tool_choice=named).choices[0].message.tool_calls[0]
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Ulm"}')
    start = " weather\nAction Input:" if family is QWEN_V1 else ' "weather", "arguments":'
    answer = server.ask([start + rest], family, tools=[TOOL], tool_choice="required").choices[0]
    assert answer.message.tool_calls[0].function.name == "weather" and answer.finish_reason == "tool_calls"
    assert server.ask([CALL], family, tools=[TOOL], tool_choice="none").choices[0].message.content == CALL
    assert "weather" not in server.engine.prompt_of()
    with pytest.raises(BadRequestError, match="not among the tools"):
        server.ask([], family, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "other"}})


def test_values_of_tagged_calls_have_the_types_of_their_parameters(server: Served) -> None:
    """Qwen3.5 and later write a value as its text alone, and begin every answer with thinking, which may be empty."""
    types = {"city": {"type": "string"}, "days": {"type": "integer"}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"properties": types}}}
    rest = "<parameter=city>\n12\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
    script = ["Hm.\n</think>\n\n<tool_call>\n<function=weather>\n", rest]
    message = server.ask(script, TAGGED, tools=[tool]).choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "12", "days": 3}
    assert message.reasoning_content == "Hm."
    chunks = server.stream(["weather>\n", rest], TAGGED, tools=[tool], tool_choice="required")
    assert server.engine.prompt_of().endswith("<think>\n\n</think>\n\n<tool_call>\n<function=")
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert json.loads("".join(piece.function.arguments for piece in pieces)) == {"city": "12", "days": 3}


def test_thinking_has_a_field_of_its_own(server: Served) -> None:
    message = server.ask(["<think>\nHm", "m.\n</th", "ink>\n\n22"], THINKS).choices[0].message
    assert (message.reasoning_content, message.content) == ("Hmm.", "22")
    chunks = server.stream(["<think>\nHm", "m.\n</th", "ink>\n\n22"], THINKS)
    assert (joined(chunks, "reasoning_content"), joined(chunks)) == ("Hmm.", "22")
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    assert server.ask(["22"], THINKS, extra_body=options).choices[0].message.content == "22"
    assert server.engine.prompt_of().endswith("assistant\n<think>\n\n</think>\n\n")


# ------------------------------------------------------------------------------------------------------------ format


def test_answers_are_checked_against_the_format(server: Served) -> None:
    schema = {"type": "object", "properties": {"t": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}
    as_object: dict[str, Any] = {"type": "json_object"}
    as_schema = {"type": "json_schema", "json_schema": {"name": "t", "schema": schema, "strict": True}}
    for response_format in (as_object, as_schema):
        assert server.ask(['{"t":', " 22}"], response_format=response_format).choices[0].message.content == '{"t": 22}'
        with pytest.raises(UnprocessableEntityError, match="does not have the response_format"):
            server.ask(["It is 22."], response_format=response_format)
        with pytest.raises(Exception, match="does not have the response_format"):
            server.stream(["It is 22."], response_format=response_format)
    with pytest.raises(UnprocessableEntityError, match="not of type 'integer'"):
        server.ask(['{"t": "22"}'], response_format=as_schema)
    with pytest.raises(BadRequestError, match="asks for JSON"):
        server.ask([], messages=[{"role": "user", "content": "Hi"}], response_format=as_object)


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"type": "strange"}, "not valid under any"),
        ({"properties": {"a": {"pattern": "(a+)+$"}}}, "pattern is not supported"),
        ({"$ref": "http://127.0.0.1:9/x"}, "outside of the schema"),
    ],
)
def test_schemas_that_cannot_be_checked_are_refused(server: Served, schema: dict[str, Any], fault: str) -> None:
    with pytest.raises(BadRequestError, match=fault):
        server.ask([], response_format={"type": "json_schema", "json_schema": {"name": "t", "schema": schema}})


def test_check_of_an_endless_schema_ends(server: Served) -> None:
    large = {"type": "json_schema", "json_schema": {"name": "t", "schema": {"multipleOf": 0.5}}}
    with pytest.raises(UnprocessableEntityError, match="too large"):
        server.ask(["1" + "0" * 400], response_format=large)
    levels = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 9} for n in range(12)} | {"d12": {}}
    schema = {"$defs": levels, "$ref": "#/$defs/d0", "properties": {"pattern": {}}}
    with pytest.raises(UnprocessableEntityError, match="too many steps"):
        server.ask(["{}"], response_format={"type": "json_schema", "json_schema": {"name": "t", "schema": schema}})


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "param", "fault"),
    [
        ({"extra_body": {"min_p": 0.1}}, "min_p", "is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "is not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "no such setting"),
        ({"temperature": -1}, "temperature", "number from"),
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 17}, "n", "16 answers"),
        ({"top_logprobs": 3}, None, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be at most 20"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop": ["x"] * 17}, None, "stop has 17 strings; 16 is the most"),
        ({"stop": "x" * 1001}, None, "1001 characters; 1000 is the most"),
        ({"stream_options": {"include_usage": True}}, None, "needs stream"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None, "differ"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "unknown"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "only parts"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "must be"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "must be"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(
    server: Served, fields: dict[str, Any], param: str | None, fault: str
) -> None:
    with pytest.raises(BadRequestError, match=fault) as caught:
        server.ask(["never"], **fields)
    assert caught.value.param == param and (caught.value.body or {})["type"] == "invalid_request_error"  # type: ignore[index]


def test_fields_without_effect_are_accepted(server: Served) -> None:
    nulls = dict.fromkeys(["min_p", "logit_bias", "tools", "stop", "seed"])
    neutral = {"logit_bias": {}, "store": False, "service_tier": "auto", "metadata": {}}
    whose = {"user": "me", "safety_identifier": "me", "prompt_cache_key": "mine"}
    assert server.ask(["a"], extra_body={**nulls, **neutral}, **whose).choices[0].message.content == "a"


def test_role_developer_is_the_system_message(server: Served) -> None:
    server.ask(["a"], messages=[{"role": "developer", "content": "Be brief."}, *ASK])
    assert server.engine.prompt_of().startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_unknown_model(server: Served) -> None:
    with pytest.raises(NotFoundError, match="not loaded") as caught:
        server.ask([], model="../other")
    assert caught.value.code == "model_not_found"
