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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from chat.arguments import to_json, to_json_again
from chat.events import EventReader
from chat.reading_hermes import TaggedCalls
from chat.segments import Message, Segment
from chat.turns import Tool, ToolCall, Turn

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
    """The tool form of the families from Qwen2.5 on, with the details in which they differ.

    Attributes:
        system_prefix: text before the tools if the conversation has no system message.
        call_example: how the description of the tools shows a call.
        keeps_strings: write string arguments verbatim instead of decoding them as JSON.
    """

    system_prefix: str = "\n\n"
    call_example: str = '{"name": <function-name>, "arguments": <args-json-object>}'
    keeps_strings: bool = False

    stops: ClassVar[tuple[str, ...]] = ()
    opening_after_result: ClassVar[str] = ""
    separator: ClassVar[str] = "\n"

    def check(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> None:
        """Accept every conversation."""

    def lost_fields(self, tools: Sequence[Tool]) -> list[str]:
        """Return nothing: descriptions are written whole."""
        return []

    def describe(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> list[Turn]:
        """Return the turns with the tools in their system message, which is added if there is none."""
        if not tools:
            return list(turns)
        text = describe_tools(map(to_json, tools), self.call_example)
        if turns and turns[0].role == "system":
            return [turns[0]._replace(content=f"{turns[0].content}\n\n{text}"), *turns[1:]]
        return [Turn("system", self.system_prefix + text), *turns]

    def calls_text(self, calls: Sequence[ToolCall]) -> str:
        """Return the calls as the end of an answer."""
        return "\n".join(
            f'<tool_call>\n{{"name": "{call.name}", "arguments": {self._arguments(call)}}}\n</tool_call>'
            for call in calls
        )

    def _arguments(self, call: ToolCall) -> str:
        if not isinstance(call.arguments, str):
            return to_json(call.arguments)
        return call.arguments if self.keeps_strings else to_json_again(call.arguments)

    def write(self, turns: Sequence[Turn], weights: Sequence[float], is_prompt: bool = False) -> list[Message]:
        """Convert turns to the content of messages; neighbouring results share one. No message stays open."""
        return write_results_as_user(turns, weights)

    def call_start(self, name: str | None) -> str:
        """Return the start of a call. It ends before a space, which models write as part of the next token."""
        start = '<tool_call>\n{"name":'
        return start if name is None else f'{start} {to_json(name)}, "arguments":'

    def reader(self, opening: str, tools: Sequence[Tool] = ()) -> EventReader:
        """Return a parser of an answer that may end with calls."""
        return TaggedCalls()


HERMES_FORMS = (
    Hermes(),  # Qwen2.5, QwQ
    Hermes(call_example='{{"name": <function-name>, "arguments": <args-json-object>}}'),  # Qwen2.5 as first published
    Hermes(system_prefix="", keeps_strings=True),  # Qwen3
)


def describe_tools(tools: Iterable[str], example: str) -> str:
    """Return the description of tools, each given as JSON, with an example of a call."""
    return _TOOLS.format(tools="\n".join(tools), example=example)


def write_results_as_user(turns: Sequence[Turn], weights: Sequence[float]) -> list[Message]:
    """Convert turns to the content of messages; neighbouring results are one message of the user."""
    messages: list[Message] = []
    for is_result, group in groupby(enumerate(turns, 1), lambda item: item[1].role == "tool"):
        numbered = list(group)
        if is_result:
            results = [(turn.content, weights[number - 1]) for number, turn in numbered]
            messages.append(Message("user", _results(results), numbered[-1][0]))
            continue
        messages += [Message.from_turn(turn, weights[number - 1], number) for number, turn in numbered]
    return messages


def _results(results: Sequence[tuple[str, float]]) -> list[Segment]:
    """Convert the texts and weights of neighbouring results to segments, one for each run of equal weights.

    They are split at line ends, which no token crosses, so that the weights do not change the ids.
    """
    texts = [f"<tool_response>\n{text}\n</tool_response>\n" for text, _ in results]
    texts[-1] = texts[-1].removesuffix("\n")
    weighted = zip(texts, (weight for _, weight in results), strict=True)
    return [
        Segment("".join(text for text, _ in run), False, weight, "tool")
        for weight, run in groupby(weighted, lambda item: item[1])
    ]
