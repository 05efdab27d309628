"""Function calls as the families from Qwen3.5 on write them: a tag for the function and one for each parameter.

The tools are described before the system message. An answer ends with its calls, and their results share one user
message, as in ``chat.tools_hermes``::

    <|im_start|>assistant
    <think>
    ...
    </think>

    Let me look.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Ulm
    </parameter>
    </function>
    </tool_call><|im_end|>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from chat.arguments import parse_exactly, to_json
from chat.events import EventReader
from chat.reading_xml import tagged_parameters
from chat.segments import Message
from chat.tools_hermes import write_results_as_user
from chat.turns import Tool, ToolCall, Turn

_TOOLS = """\
# Tools

You have access to the following functions:

<tools>
{tools}
</tools>

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within \
<tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT after
- If there is no function call available, answer the question like normal with your current knowledge and do not tell \
the user about function calls
</IMPORTANT>"""


@dataclass(frozen=True)
class XmlCalls:
    """The tool form of the families from Qwen3.5 on, with the detail in which they differ.

    Attributes:
        writes_python: numbers, truth values and null are written as Python does (``True``, ``None``), not as JSON.
            Within lists and objects they are JSON.
    """

    writes_python: bool = False

    stops: ClassVar[tuple[str, ...]] = ()
    opening_after_result: ClassVar[str] = ""
    separator: ClassVar[str] = "\n\n"
    keeps_strings: ClassVar[bool] = False

    def check(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> None:
        """Check that the arguments of all calls are JSON objects."""
        for call in (call for turn in turns for call in turn.calls):
            _arguments(call)

    def lost_fields(self, tools: Sequence[Tool]) -> list[str]:
        """Return nothing: descriptions are written whole."""
        return []

    def describe(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> list[Turn]:
        """Return the turns with the tools before their system message, which is added if there is none."""
        if not tools:
            return list(turns)
        text = _TOOLS.format(tools="\n".join(map(to_json, tools)))
        if not turns or turns[0].role != "system":
            return [Turn("system", text), *turns]
        own = turns[0].content
        return [turns[0]._replace(content=f"{text}\n\n{own}" if own else text), *turns[1:]]

    def calls_text(self, calls: Sequence[ToolCall]) -> str:
        """Return the calls as the end of an answer."""
        return "\n".join(map(self._call_text, calls))

    def _call_text(self, call: ToolCall) -> str:
        parameters = "".join(
            f"<parameter={name}>\n{self._value(value)}\n</parameter>\n" for name, value in _arguments(call).items()
        )
        return f"<tool_call>\n<function={call.name}>\n{parameters}</function>\n</tool_call>"

    def _value(self, value: Any) -> str:
        """Return a value's text. Texts are written as they are, so ``"12"`` and ``12`` look the same."""
        if isinstance(value, str):
            return value
        return to_json(value) if isinstance(value, list | dict) or not self.writes_python else str(value)

    def write(self, turns: Sequence[Turn], weights: Sequence[float], is_prompt: bool = False) -> list[Message]:
        """Convert turns to the content of messages; neighbouring results share one. No message stays open."""
        return write_results_as_user(turns, weights)

    def call_start(self, name: str | None) -> str:
        """Return the start of a call. It ends before the name, or after the line that has it."""
        return "<tool_call>\n<function=" + ("" if name is None else f"{name}>\n")

    def reader(self, opening: str, tools: Sequence[Tool] = ()) -> EventReader:
        """Return a parser of an answer that may end with calls."""
        return tagged_parameters(tools, self.separator)


XML_FORMS = (XmlCalls(writes_python=True), XmlCalls())  # Qwen3.5; Qwen3.6 and Qwen3.8


def _arguments(call: ToolCall) -> Mapping[str, Any]:
    """Return the arguments of a call by name.

    Raises:
        ValueError: they are not a JSON object.
    """
    value = call.arguments
    if isinstance(value, str):
        try:
            value = parse_exactly(value) if value.strip() else {}
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        raise ValueError(f"the arguments of a call of {call.name!r} are not a JSON object, which its chat format needs")
    return value
