"""Function calls as Qwen v1 writes them: ReAct text (Yao et al. 2022) in ChatML messages, with no token of its own.

The tools are described in a user message. What follows it, down to the final answer, is one assistant message::

    Thought: ...
    Action: get_weather
    Action Input: {"city": "Ulm"}
    Observation: 22        <- the function's result
    Thought: I now know the final answer.
    Final Answer: ...

``Observation:`` is written by the model, and whoever serves it stops there; the result behind it is not the model's.
The texts and the order of the parts are those of Qwen's API server and of its fine-tuning examples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from chat.turns import Message, Piece, Tool, ToolCall, Turn

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
_ACTION, _INPUT, _OBSERVATION, _FINAL = "\nAction:", "\nAction Input:", "\nObservation:", "\nFinal Answer: "


def describe_tools(tools: Sequence[Tool]) -> str:
    """The instruction that stands before ``Question:`` in a user message."""
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


def write_react(
    turns: Sequence[Turn],
    weights: Sequence[float],
    tools: Sequence[Tool],
    is_prompt: bool = False,
    described_in: Literal["first", "recent"] = "first",
) -> list[Message]:
    """Turns with tools, calls and results as messages, without line breaks around their texts.

    Args:
        weights: of each turn, in the loss.
        is_prompt: the model is to go on: a last result ends in the open thought behind it.
        described_in: the user message that describes the tools. ``first`` is that of Qwen's fine-tuning examples; no
            message changes when others follow. ``recent``, that of Qwen's API server, is the last question that was
            answered, or the only one.

    Raises:
        ValueError: what this form cannot express; the message says what.
    """
    described = _describing_turn(turns, described_in) if tools else None
    messages: list[Message] = []
    index = 0
    while index < len(turns):
        turn = turns[index]
        if turn.role in ("assistant", "tool"):
            end = next((i for i in range(index, len(turns)) if turns[i].role not in ("assistant", "tool")), len(turns))
            pieces = _exchange(turns[index:end], weights[index:end], is_prompt and end == len(turns))
            is_open = bool(turns[end - 1].calls) or (is_prompt and end == len(turns) and turns[end - 1].role == "tool")
            messages.append(Message("assistant", pieces, end, is_open))
            index = end
            continue
        text = _strip(turn.content)
        if index == described:
            text = f"{describe_tools(tools)}\n\nQuestion: {text}"
        index += 1
        messages.append(Message(turn.role, (Piece(text, turn.role, weights[index - 1]),), index))
    return messages


@dataclass(frozen=True)
class React:
    """``write_react`` as a family's tool form: it writes everything into the texts of turns itself."""

    def describe(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> list[Turn]:
        return list(turns)

    def calls_text(self, calls: Sequence[ToolCall]) -> str:
        return ""

    def write(
        self, turns: Sequence[Turn], weights: Sequence[float], tools: Sequence[Tool], is_prompt: bool = False
    ) -> list[Message]:
        return write_react(turns, weights, tools, is_prompt)


def _describing_turn(turns: Sequence[Turn], described_in: str) -> int:
    users = [index for index, turn in enumerate(turns) if turn.role == "user"]
    if not users:
        raise ValueError("there are tools, and no user turn that could describe them")
    if described_in == "first":
        return users[0]
    return users[-2] if len(users) > 1 and turns[-1].role == "user" else users[-1]


def _exchange(turns: Sequence[Turn], weights: Sequence[float], is_prompt: bool) -> tuple[Piece, ...]:
    """What stands between two user messages: calls, each with its result, and the answer."""
    pieces: list[Piece] = []
    for text, role, weight in _steps(turns, weights, is_prompt):
        before = pieces[-1] if pieces else None
        if role == "assistant" and before is not None and before.role == "tool":
            pieces[-1] = before._replace(text=f"{before.text}\n{_THOUGHT}")
            text = text.removeprefix(_THOUGHT)
        elif role == "assistant" and before is not None:
            text = f"\n{text}"
        pieces.append(Piece(text, role, weight))
    if is_prompt and pieces[-1].role == "tool":
        pieces[-1] = pieces[-1]._replace(text=f"{pieces[-1].text}\n{_THOUGHT}")
    return tuple(pieces)


def _steps(turns: Sequence[Turn], weights: Sequence[float], is_prompt: bool) -> Iterator[tuple[str, str, float]]:
    """Text, author and weight of each step. Calls that were made at once come one after the other."""
    index = 0
    while index < len(turns):
        turn, weight = turns[index], weights[index]
        if turn.role == "tool":
            raise ValueError("a result of a function stands behind no call")
        index += 1
        thought = _strip(turn.content)
        if not turn.calls:
            yield _ANSWER + thought, "assistant", weight
            continue
        thought = thought if thought.startswith(_THOUGHT) else f"{_THOUGHT} {thought}"
        results = [i for i in range(index, min(index + len(turn.calls), len(turns))) if turns[i].role == "tool"]
        if not results and len(turn.calls) > 1:
            raise ValueError(
                f"{len(turn.calls)} calls at once wait for their results, ReAct text can only wait for one"
            )
        for call, result in zip_longest(turn.calls, results):
            said = f"{thought}{_ACTION} {call.name}{_INPUT} {call.arguments_text.strip()}"
            waits = result is None and is_prompt
            yield said if waits else said + _OBSERVATION, "assistant", weight
            if result is not None:
                yield f" {_strip(turns[result].content)}", "tool", weights[result]
            thought = f"{_THOUGHT} "
        index += len(results)


def _strip(text: str) -> str:
    return text.lstrip("\n").rstrip()


def parse_react(text: str) -> tuple[str, ToolCall | None]:
    """What the model wrote, as content and, if it calls a function, the call.

    Args:
        text: an answer down to, or with, ``Observation:``.

    Returns:
        The thought and the call, or the final answer (the whole text where there is none) and ``None``.
    """
    action, given = text.find(_ACTION), text.find(_INPUT)
    if 0 <= action < given:
        observation = text.find(_OBSERVATION)
        if observation < given:
            text = text.rstrip() + _OBSERVATION
            observation = text.find(_OBSERVATION)
        name = text[action + len(_ACTION) : given].strip()
        if name:
            thought = text[:action]
            _, _, behind = thought.partition(f"{_THOUGHT} ")
            arguments = text[given + len(_INPUT) : observation].strip()
            return (behind or thought).strip(), ToolCall(name, arguments)
    _, found, answer = text.rpartition(_FINAL)
    return (answer if found else text), None
