"""Function calls as Qwen v1 writes them: ReAct text (Yao et al. 2022) in ChatML messages, without tokens of its own.

The first user message describes the tools. All that follows it, up to the final answer, is one assistant message::

    Thought: ...
    Action: get_weather
    Action Input: {"city": "Ulm"}
    Observation: 22        <- the function's result
    Thought: I now know the final answer.
    Final Answer: ...

The model writes ``Observation:``, and a server stops there; the result after it is not the model's. The wording and
the order of the parts are those of Qwen's fine-tuning examples and of its API server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile, zip_longest
from typing import ClassVar

from chat.events import EventReader
from chat.reading_react import ReactText
from chat.segments import Message, Segment
from chat.turns import Tool, ToolCall, Turn

_INSTRUCTION = """\
Answer the following questions as best you can. You have access to the following APIs:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!"""
_TOOL = (
    "{name}: Call this tool to interact with the {human} API. What is the {human} API useful for? {description} "
    "Parameters: {parameters}"
)
_THOUGHT, _ANSWER = "Thought:", "Thought: I now know the final answer.\nFinal Answer: "
_ACTION, _INPUT, _OBSERVATION = "\nAction:", "\nAction Input:", "\nObservation:"
_EXCHANGE_ROLES = ("assistant", "tool")
_WRITTEN = ("name", "name_for_model", "name_for_human", "description", "description_for_model", "parameters")
# They say nothing about the function itself.
_FORMAL = ("type", "strict")


@dataclass(frozen=True)
class React:
    """The tool form of Qwen v1."""

    stops: ClassVar[tuple[str, ...]] = (_OBSERVATION,)
    opening_after_result: ClassVar[str] = _THOUGHT
    separator: ClassVar[str] = ""

    def check(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> None:
        """Check that a conversation can be written as ReAct text.

        Raises:
            ValueError: tools without a user turn, a result without a call, or several open calls.
        """
        if tools and all(turn.role != "user" for turn in turns):
            raise ValueError("there are tools, but no user turn to describe them in")
        index = 0
        while index < len(turns):
            turn = turns[index]
            index += 1
            if turn.role == "tool":
                raise ValueError("a tool result does not follow a call")
            if turn.calls:
                results = _count_results(turns, index, len(turn.calls))
                if not results and len(turn.calls) > 1:
                    raise ValueError(f"{len(turn.calls)} calls at once have no results; ReAct text allows one")
                index += results

    def lost_fields(self, tools: Sequence[Tool]) -> list[str]:
        """Return the names of fields with content that ``describe_tools`` leaves out."""
        lost: dict[str, None] = {}
        for tool in tools:
            inner = tool.get("function")
            fields = {**(inner or {}), **{name: value for name, value in tool.items() if name != "function"}}
            lost |= {name: None for name, value in fields.items() if name not in (*_WRITTEN, *_FORMAL) and value}
        return list(lost)

    def describe(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> list[Turn]:
        """Return the turns with the tools in the first user turn, so that no message changes when others follow."""
        described = [
            turn if turn.role in _EXCHANGE_ROLES else turn._replace(content=_strip(turn.content)) for turn in turns
        ]
        if tools:
            first = next(index for index, turn in enumerate(described) if turn.role == "user")
            question = f"{describe_tools(tools)}\n\nQuestion: {described[first].content}"
            described[first] = described[first]._replace(content=question)
        return described

    def calls_text(self, calls: Sequence[ToolCall]) -> str:
        """Return nothing: ``write`` adds the calls, because their results are in the same message."""
        return ""

    def write(self, turns: Sequence[Turn], weights: Sequence[float], is_prompt: bool = False) -> list[Message]:
        """Convert turns to the content of messages, with all answers, calls and results after a question in one.

        Args:
            weights: loss weight of each turn.
            is_prompt: the model is to continue; after a result, the message ends with the start of a thought.
        """
        messages: list[Message] = []
        for in_exchange, group in groupby(enumerate(turns), lambda item: item[1].role in _EXCHANGE_ROLES):
            indices = [index for index, _ in group]
            if not in_exchange:
                messages += [Message.from_turn(turns[index], weights[index], index + 1) for index in indices]
                continue
            start, end = indices[0], indices[-1] + 1
            is_continued = is_prompt and end == len(turns)
            segments = _exchange(turns[start:end], weights[start:end], is_continued)
            is_open = bool(turns[end - 1].calls) or (is_continued and turns[end - 1].role == "tool")
            messages.append(Message("assistant", segments, end, is_open))
        return messages

    def call_start(self, name: str | None) -> str:
        """Return the start of a call without a thought. It ends before a space, which belongs to the next token."""
        return _THOUGHT + _ACTION + ("" if name is None else f" {name}{_INPUT}")

    def reader(self, opening: str, tools: Sequence[Tool] = ()) -> EventReader:
        """Return a parser of a thought with a call, or of a final answer."""
        return ReactText(opening)


def describe_tools(tools: Sequence[Tool]) -> str:
    """Return the instruction that precedes ``Question:`` in a user message."""
    names, texts = [], []
    for tool in tools:
        function = tool.get("function") or tool
        name = function.get("name_for_model") or function["name"]
        parameters = function.get("parameters")
        names.append(name)
        texts.append(
            _TOOL.format(
                name=name,
                human=function.get("name_for_human") or name,
                description=function.get("description_for_model") or function.get("description") or "",
                parameters=json.dumps({} if parameters is None else parameters, ensure_ascii=False),
            )
        )
    return _INSTRUCTION.format(tools="\n\n".join(texts), names=", ".join(names))


def _exchange(turns: Sequence[Turn], weights: Sequence[float], is_continued: bool) -> list[Segment]:
    """Return the text between two user messages: calls, each with its result, and the answer."""
    segments: list[Segment] = []
    for text, role, weight in _steps(turns, weights, is_continued):
        previous = segments[-1] if segments else None
        if role == "assistant" and previous is not None and previous.role == "tool":
            # As in a prompt, the thought is opened after the result; the model continues it.
            segments[-1] = previous._replace(text=f"{previous.text}\n{_THOUGHT}")
            text = text.removeprefix(_THOUGHT)
        elif role == "assistant" and previous is not None:
            text = f"\n{text}"
        segments.append(Segment(text, False, weight, role))
    if is_continued and segments[-1].role == "tool":
        segments[-1] = segments[-1]._replace(text=f"{segments[-1].text}\n{_THOUGHT}")
    return segments


def _steps(turns: Sequence[Turn], weights: Sequence[float], is_continued: bool) -> Iterator[tuple[str, str, float]]:
    """Yield text, author and weight of each step. Parallel calls are written one after the other."""
    index = 0
    while index < len(turns):
        turn, weight = turns[index], weights[index]
        index += 1
        thought = _strip(turn.content)
        if not turn.calls:
            yield _ANSWER + thought, "assistant", weight
            continue
        thought = thought if thought.startswith(_THOUGHT) else f"{_THOUGHT} {thought}"
        results = range(index, index + _count_results(turns, index, len(turn.calls)))
        for call, result in zip_longest(turn.calls, results):
            text = f"{thought}{_ACTION} {call.name}{_INPUT} {call.arguments_text.strip()}"
            waits = result is None and is_continued
            yield text if waits else text + _OBSERVATION, "assistant", weight
            if result is not None:
                yield f" {_strip(turns[result].content)}", "tool", weights[result]
            thought = f"{_THOUGHT} "
        index += len(results)


def _count_results(turns: Sequence[Turn], start: int, calls: int) -> int:
    """Return the number of results from ``start`` on that belong to ``calls`` calls."""
    return sum(1 for _ in takewhile(lambda turn: turn.role == "tool", turns[start : start + calls]))


def _strip(text: str) -> str:
    return text.lstrip("\n").rstrip()
