"""Messages in OpenAI's form become turns, and turns the ids of a prompt. Texts in them never become control tokens.

A field that is not known here is refused by its name: ignored, it would change an answer without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chat.families import Family
from chat.render import encode_prompt, render_prompt
from chat.turns import Tool, ToolCall, Turn
from serving.requests import RequestError, shown

ROLES = ("system", "developer", "user", "assistant", "tool")

_FIELDS = {
    "system": {"role", "content", "name"},
    "developer": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls", "reasoning_content", "refusal", "annotations", "audio"},
    "tool": {"role", "content", "name", "tool_call_id"},
}
# Fields of an answer that clients send back with it; only empty ones have no meaning here.
_EMPTY = ("name", "refusal", "annotations", "audio")


def render_turns(
    turns: Sequence[Turn], tools: Sequence[Tool], family: Family, tokenizer: Any, system: str | None = None
) -> tuple[int, ...]:
    """Return the ids of the prompt for the next answer; see ``Engine.render``.

    Raises:
        RequestError: the family has no such prompt.
    """
    if turns[-1].role == "assistant" and not family.prompts_after_answer:
        raise RequestError("messages", "the last one is an answer, and this model's chat format continues none")
    if turns[-1].calls:
        raise RequestError("messages", "the last one calls functions; their results have to follow")
    if tools and family.tool_form is None:
        what = f"the chat template of this model ({family.name}) writes no tools that are known here"
        raise RequestError("tools", what, "Leave them out, or take a model that calls functions, from Qwen2.5 on")
    try:
        rendered = render_prompt(turns, family, system, tools=tools)
    except ValueError as error:
        raise RequestError("messages", str(error)) from None
    return tuple(encode_prompt(rendered, tokenizer))


def parse_messages(messages: Sequence[Mapping[str, Any]], family: Family) -> list[Turn]:
    """Parse messages to turns, with the results of calls in the order of their calls.

    Raises:
        RequestError: an unknown role or field, a part that is not text, or results that fit no calls.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages", "must be a list with at least one message")
    turns: list[Turn] = []
    open_ids: list[str] = []  # of calls without results, in their order
    results: dict[str, Turn] = {}
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        turn = _parse_message(message, place, family)
        if turn.role == "tool":
            _add_result(message, turn, place, open_ids, results)
            if len(results) == len(open_ids):
                turns += [results[id_] for id_ in open_ids]
                open_ids, results = [], {}
            continue
        if open_ids:
            raise RequestError(place, f"the call {open_ids[len(results)]!r} has no result yet", "Add a tool message")
        turns.append(turn)
        if turn.calls:
            open_ids = [_call_id(call, f"{place}.tool_calls[{n}]") for n, call in enumerate(message["tool_calls"])]
            if len(set(open_ids)) < len(open_ids):
                raise RequestError(f"{place}.tool_calls", "two calls have the same id")
    if results:
        missing = next(id_ for id_ in open_ids if id_ not in results)
        raise RequestError("messages", f"the call {missing!r} has no result", "Add a tool message")
    return turns


def _parse_message(message: Any, place: str, family: Family) -> Turn:
    if not isinstance(message, Mapping):
        raise RequestError(place, f"must be an object, not {shown(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{place}.role", f"{shown(role)} is unknown", f"Use one of {', '.join(ROLES)}")
    for name, value in message.items():
        if name not in _FIELDS[role] or (name in _EMPTY and value):
            raise RequestError(f"{place}.{name}", f"is not supported in a message of the role {role}")
    calls = _parse_calls(message.get("tool_calls"), f"{place}.tool_calls")
    content = _parse_content(message.get("content"), f"{place}.content", may_lack=bool(calls))
    thinking = message.get("reasoning_content")
    if thinking is None:
        return Turn("system" if role == "developer" else role, content, calls)
    if not isinstance(thinking, str):
        raise RequestError(f"{place}.reasoning_content", f"must be a string, not {shown(thinking)}")
    if thinking and not (family.has_thinking and family.knows_thinking):
        raise RequestError(f"{place}.reasoning_content", "this model's chat format has no thinking")
    return Turn(role, content, calls, thinking=thinking or None)


def _parse_content(content: Any, place: str, may_lack: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_lack:
        return ""
    if not isinstance(content, Sequence):
        raise RequestError(place, f"must be a string or a list of text parts, not {shown(content)}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise RequestError(f"{place}[{index}]", f"{shown(part)} is not supported, only parts of the type text")
        texts.append(text)
    return "".join(texts)


def _parse_calls(calls: Any, place: str) -> tuple[ToolCall, ...]:
    if not calls:
        return ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(place, f"must be a list, not {shown(calls)}")
    parsed = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if not _is_name(name):
            raise RequestError(f"{place}[{index}].function.name", f"{shown(name)} is not the name of a function")
        if not isinstance(arguments, str):
            raise RequestError(f"{place}[{index}].function.arguments", f"must be a string, not {shown(arguments)}")
        parsed.append(ToolCall(str(name), arguments))
    return tuple(parsed)


def _call_id(call: Mapping[str, Any], place: str) -> str:
    id_ = call.get("id")
    if not isinstance(id_, str) or not id_:
        raise RequestError(f"{place}.id", f"must be a string, not {shown(id_)}")
    return id_


def _add_result(
    message: Mapping[str, Any], turn: Turn, place: str, open_ids: Sequence[str], results: dict[str, Turn]
) -> None:
    id_ = message.get("tool_call_id")
    if id_ not in open_ids or id_ in results:
        what = f"{shown(id_)} is not the id of a call without a result in the message before"
        raise RequestError(f"{place}.tool_call_id", what)
    results[str(id_)] = turn


def check_tools(tools: Sequence[Any]) -> list[Tool]:
    """Check the form of tools, and return them.

    Raises:
        RequestError: a tool that is not OpenAI's description of a function.
    """
    for index, tool in enumerate(tools):
        _check_tool(tool, f"tools[{index}]")
    return [dict(tool) for tool in tools]


def _check_tool(tool: Any, place: str) -> None:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise RequestError(place, f'must be {{"type": "function", "function": {{...}}}}, not {shown(tool)}')
    if not _is_name(function.get("name")):
        raise RequestError(f"{place}.function.name", f"{shown(function.get('name'))} is not the name of a function")
    parameters = function.get("parameters", {})
    if not isinstance(parameters, (Mapping, list)):  # Qwen v1 has a list of parameters, too
        raise RequestError(f"{place}.function.parameters", f"must be an object or a list, not {shown(parameters)}")


def _is_name(name: Any) -> bool:
    """Return whether a name can be written in every tool form: it ends neither a line nor a string."""
    return isinstance(name, str) and bool(name) and name.isprintable() and not set(name) & set('"\\')
