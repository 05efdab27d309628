"""ReAct text for Qwen v1: recorded prompts of its API server, and which parts are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chat.families import ANSWER_STYLES, QWEN_V1
from chat.render import encode_prompt, render, render_prompt, text_of
from chat.tools_react import React, describe_tools
from chat.turns import ToolCall, Turn
from data_utils.encode import EncodeOptions, Encoder
from data_utils.formats import FORMATS
from errors import DataError
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.encoding import trained_of
from tests.golden import Golden

WEATHER = {"name": "weather", "description": "Weather of a city.", "parameters": {"type": "object"}}
ASK, CALL = Turn("user", "Ulm?"), Turn("assistant", "I look.", (ToolCall("weather", {"city": "Ulm", "días": None}),))
RESULT, ANSWER = Turn("tool", "22\n"), Turn("assistant", "It is 22.")
CALLED = 'Thought: I look.\nAction: weather\nAction Input: {"city": "Ulm", "días": null}'
CONCLUSION = " I now know the final answer.\nFinal Answer: "


def turns_of(case: dict[str, Any]) -> list[Turn]:
    """Return the messages of a recorded request."""
    turns = []
    for message in case["messages"]:
        call = message.get("function_call")
        calls = (ToolCall(call["name"], call["arguments"]),) if call else ()
        role = "tool" if message["role"] == "function" else message["role"]
        turns.append(Turn(role, message.get("content") or "", calls))
    return turns


def with_functions(golden: Golden) -> list[dict[str, Any]]:
    cases = golden.load_json("react.json")["parse_messages"]
    return [case for case in cases if case["functions"] and "error" not in case]


def describe_in_recent_question(turns: list[Turn], tools: list[Any]) -> list[Turn]:
    """Describe the tools where Qwen's API server does: in the last question that was answered, or the only one."""
    questions = [index for index, turn in enumerate(turns) if turn.role == "user"]
    recent = questions[-2] if len(questions) > 1 and turns[-1].role == "user" else questions[-1]
    return [*React().describe(turns[:recent], ()), *React().describe(turns[recent:], tools)]


def test_messages_equal_every_recorded_request(any_golden: Golden) -> None:
    cases = with_functions(any_golden)
    assert cases
    for case in cases:
        turns = turns_of(case)
        described = describe_in_recent_question(turns, case["functions"])
        messages = React().write(described, [1.0] * len(turns), is_prompt=True)
        written = [text_of([message]) for message in messages if message.role != "system"]
        recorded = [text for exchange in case["history"] for text in exchange]
        assert written == recorded + [case["query"]] * (not case["text_completion"]), case["tag"]


def test_prompts_after_a_result_equal_the_recorded_ones(any_golden: Golden) -> None:
    """With several questions the server describes the tools in a later one."""
    cases = [case for case in with_functions(any_golden) if case["text_completion"]]
    cases = [case for case in cases if sum(turn.role == "user" for turn in turns_of(case)) == 1]
    assert cases or any_golden.name == "large"
    for case in cases:
        prompt = render_prompt(turns_of(case), QWEN_V1, tools=case["functions"])
        assert text_of(prompt) == case["text_completion_prompt"], case["tag"]


def test_text_equals_qwens_fine_tuning_example(golden_large: Path) -> None:
    """The text of the same conversation is equal, except for a full stop that Qwen's server writes."""
    example = Golden("large", golden_large).load_json("chatml.json")["function_call_finetune_examples"][0]
    question, answer = (turn["value"] for turn in example["conversations"])
    tools = [
        {
            "name_for_human": "Google Search",
            "name_for_model": "google_search",
            "description_for_model": "Google Search is a general search engine that can be used to access the "
            "internet, query encyclopedia knowledge, and stay informed about current events. Format the arguments as "
            "a JSON object.",
            "parameters": [
                {
                    "name": "search_query",
                    "description": "Search keywords or phrases",
                    "required": True,
                    "schema": {"type": "string"},
                }
            ],
        },
        {
            "name_for_human": "Code Interpreter",
            "name_for_model": "code_interpreter",
            "description_for_model": "Code interpreter that can execute Python code.Enclose the code within triple "
            "backticks (`) at the beginning and end of the code.",
            "parameters": [
                {"name": "code", "description": "Code to be executed", "required": True, "schema": {"type": "string"}}
            ],
        },
    ]
    searches = [(ToolCall("google_search", {"search_query": query}),) for query in ("Jay Chou", "Jay Chou's wife")]
    turns = [
        Turn("user", "Who is jay chou? And who is his wife?"),
        Turn("assistant", "I need to google Jay Chou.", searches[0]),
        Turn("tool", "Jay Chou is ..."),
        Turn("assistant", "I need to google Jay's wife.", searches[1]),
        Turn("tool", "Jay Chou's wife is ..."),
        Turn("assistant", "Jay Chou is ... His wife is ..."),
    ]
    user, assistant = React().write(React().describe(turns, tools), [1.0] * len(turns))
    assert user.segments[0].text == question
    assert text_of([assistant]).replace("final answer.\n", "final answer\n") == answer


def test_null_fields_of_a_tool_count_as_absent() -> None:
    null = {"name": "now", "description": None, "parameters": None, "function": None, "name_for_human": None}
    assert describe_tools([null]) == describe_tools([{"name": "now"}])
    assert "Parameters: []" in describe_tools([{"name": "now", "parameters": []}])


def trained(turns: list[Turn], **options: Any) -> list[tuple[str, float]]:
    """Return the rendered text as runs of the same weight."""
    runs: list[tuple[str, float]] = []
    for message in render(turns, QWEN_V1, tools=[WEATHER], **options):
        for segment in message.segments:
            if runs and runs[-1][1] == segment.weight:
                runs[-1] = (runs[-1][0] + segment.text, segment.weight)
            else:
                runs.append((segment.text, segment.weight))
    return runs


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QUESTION = f"{SYSTEM}<|im_start|>user\n{describe_tools([WEATHER])}\n\nQuestion: Ulm?<|im_end|>\n<|im_start|>assistant\n"


def test_calls_and_answers_are_trained_and_results_are_not() -> None:
    assert trained([ASK, CALL, RESULT, ANSWER]) == [
        (QUESTION, 0),
        (f"{CALLED}\nObservation:", 1),
        (" 22\nThought:", 0),
        (f"{CONCLUSION}It is 22.<|im_end|>\n", 1),
    ]


def test_mask_last_trains_the_last_answer_only() -> None:
    assert trained([ASK, CALL, RESULT, ANSWER], label_mask="last") == [
        (f"{QUESTION}{CALLED}\nObservation: 22\nThought:", 0),
        (f"{CONCLUSION}It is 22.<|im_end|>\n", 1),
    ]


def test_turn_weights_override_the_mask() -> None:
    turns = [ASK, CALL._replace(weight=0.0), RESULT, ANSWER._replace(weight=2.0)]
    assert [weight for _, weight in trained(turns)] == [0, 2]


def test_open_call_is_trained_up_to_observation() -> None:
    """The model writes ``Observation:``, where a server stops; it never writes the end of the message after it."""
    assert trained([ASK, CALL]) == [(QUESTION, 0), (f"{CALLED}\nObservation:", 1), ("<|im_end|>\n", 0)]


def test_calls_at_once_are_written_one_after_the_other() -> None:
    both = CALL._replace(calls=(ToolCall("weather", '{"city":"Ulm"}'), ToolCall("weather", [1e-07, 2])))
    other = Turn("tool", "23")
    assert [text for text, _ in trained([ASK, both, RESULT, other, ANSWER])][1:4] == [
        'Thought: I look.\nAction: weather\nAction Input: {"city":"Ulm"}\nObservation:',
        " 22\nThought:",
        " \nAction: weather\nAction Input: [1e-07, 2]\nObservation:",
    ]
    with pytest.raises(ValueError, match="2 calls at once have no results; ReAct text allows one"):
        trained([ASK, both])


def test_prompt_is_a_prefix_of_the_training_ids_at_every_step(golden_large: Path) -> None:
    tokenizer = QWenTokenizer.from_pretrained(golden_large / "tiny-qwen")
    turns = [ASK, CALL, RESULT, ANSWER, Turn("user", "And Bonn?"), CALL, Turn("tool", "\n"), ANSWER]
    record = {
        "tools": [WEATHER],
        "messages": [
            {"role": turn.role, "content": turn.content, "tool_calls": [
                {"id": "x", "function": {"name": call.name, "arguments": call.arguments_text}} for call in turn.calls
            ]} if turn.calls else {"role": turn.role, "content": turn.content}
            for turn in turns
        ],
    }  # fmt: skip
    conversation = FORMATS["messages"].parse(record, "here")
    encoded = Encoder(tokenizer, QWEN_V1, EncodeOptions()).encode_conversation(conversation)
    assert tokenizer.decode(encoded.input_ids) == text_of(render(turns, QWEN_V1, tools=[WEATHER]))
    for index in (1, 3, 5, 7):
        prompt = encode_prompt(render_prompt(turns[:index], QWEN_V1, tools=[WEATHER]), tokenizer)
        assert encoded.input_ids[: len(prompt)] == prompt, index
        assert trained_of(encoded)[len(prompt) - 1 : len(prompt) + 1] == [False, True], index


def test_conversation_that_cannot_be_written_is_refused_with_its_location(golden_small: Path) -> None:
    tokenizer = QWenTokenizer.from_pretrained(golden_small / "tiny-qwen-small")
    answer, question = {"from": "gpt", "value": "Hi"}, {"from": "human", "value": "Hi"}
    for family, turns, what in (
        (QWEN_V1, [answer], "there are tools, but no user turn to describe them in"),
        (ANSWER_STYLES[0], [question, answer], "the chat format 'chatml' cannot write tools"),
    ):
        conversation = FORMATS["conversations"].parse({"tools": [WEATHER], "conversations": turns}, "a.json:3")
        with pytest.raises(DataError, match=rf"^a\.json:3: {what}"):
            Encoder(tokenizer, family, EncodeOptions()).check_conversation(conversation)
