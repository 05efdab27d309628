"""Function calls as the families from Qwen2.5 on write them: JSON between tags.

The tools are described at the end of the system message. An answer ends with its calls, and their results share one
user message::

    <|im_start|>assistant
    Let me look.
    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Ulm"}}
    </tool_call><|im_end|>
    <|im_start|>user
    <tool_response>
    22
    </tool_response><|im_end|>
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from chat.turns import Message, Piece, Tool, ToolCall, Turn

_TOOLS = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{example}
</tool_call>"""


@dataclass(frozen=True)
class Hermes:
    """What differs between the families that write calls in this way.

    Attributes:
        opening: what stands before the tools where the conversation has no system message.
        example: what a call looks like, in the description.
        keeps_text: whether arguments that are text are written as they stand; else the JSON value that they are is.
    """

    opening: str = "\n\n"
    example: str = '{"name": <function-name>, "arguments": <args-json-object>}'
    keeps_text: bool = False

    def describe(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> list[Turn]:
        """The turns with the tools in their system message, which is added where there is none."""
        if not tools:
            return list(turns)
        text = _TOOLS.format(tools="\n".join(map(_json, tools)), example=self.example)
        if turns and turns[0].role == "system":
            return [turns[0]._replace(content=f"{turns[0].content}\n\n{text}"), *turns[1:]]
        return [Turn("system", self.opening + text), *turns]

    def calls_text(self, calls: Sequence[ToolCall]) -> str:
        """What an answer ends with."""
        return "\n".join(
            f'<tool_call>\n{{"name": "{call.name}", "arguments": {self._arguments(call)}}}\n</tool_call>'
            for call in calls
        )

    def _arguments(self, call: ToolCall) -> str:
        if not isinstance(call.arguments, str):
            return _json(call.arguments)
        return call.arguments if self.keeps_text else _json_of_text(call.arguments)

    def write(
        self, turns: Sequence[Turn], weights: Sequence[float], tools: Sequence[Tool], is_prompt: bool = False
    ) -> list[Message]:
        """Turns as messages; their calls and tools stand in their text already. Nothing is left open."""
        messages: list[Message] = []
        for is_result, group in groupby(enumerate(turns, 1), lambda numbered: numbered[1].role == "tool"):
            numbered = list(group)
            if is_result:
                pieces = _results([turn for _, turn in numbered], [weights[end - 1] for end, _ in numbered])
                messages.append(Message("user", pieces, numbered[-1][0]))
                continue
            messages += [
                Message(turn.role, (Piece(turn.content, turn.role, weights[end - 1]),), end) for end, turn in numbered
            ]
        return messages


HERMES_FORMS = (
    Hermes(),  # Qwen2.5, QwQ
    Hermes(example='{{"name": <function-name>, "arguments": <args-json-object>}}'),  # Qwen2.5 as first published
    Hermes(opening="", keeps_text=True),  # Qwen3
)


def _results(turns: Sequence[Turn], weights: Sequence[float]) -> tuple[Piece, ...]:
    """Results of calls. Neighbours of one weight are one piece, tokenised at once; others are cut at line ends, which
    no token reaches across."""
    texts = [f"<tool_response>\n{turn.content}\n</tool_response>\n" for turn in turns]
    texts[-1] = texts[-1].removesuffix("\n")
    grouped = groupby(zip(texts, weights, strict=True), lambda piece: piece[1])
    return tuple(Piece("".join(text for text, _ in group), "tool", weight) for weight, group in grouped)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _json_of_text(text: str) -> str:
    """The JSON value that a text is; a string where it is none, or where decoding it would lose something."""
    try:
        return _json(json.loads(text, object_pairs_hook=_object, parse_float=_float, parse_constant=_float))
    except (ValueError, RecursionError):
        return _json(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    decoded = dict(pairs)
    if len(decoded) < len(pairs):
        raise ValueError("a key is given twice")
    return decoded


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number that JSON does not have")
    return value
