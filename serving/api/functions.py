"""OpenAI's older form of calls, ``functions`` and ``function_call``, which the API server of Qwen v1 has, as tools."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from serving.api.errors import ApiError
from serving.requests import RequestError

# Names of fields of the present form, and of the older one.
_OLDER = (
    (r"^tools\[(\d+)\](\.function)?", r"functions[\1]"),
    (r"^tools\b", "functions"),
    (r"^tool_choice", "function_call"),
    (r"\.tool_calls\[0\]\.function", ".function_call"),
)


def tools_of_functions(functions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return functions as tools. Qwen's own keys (``name_for_model``, ...) stay, beside ``name``."""
    return [
        {"type": "function", "function": {**function, "name": function.get("name") or function.get("name_for_model")}}
        for function in functions
    ]


def in_older_form(error: ApiError) -> ApiError:
    """Return an error with the names of the older form, for a request that has it."""
    param, message = error.param or "", error.message
    for present, older in _OLDER:
        param, message = re.sub(present, older, param), re.sub(present, older, message)
    return ApiError(error.status, message, param or None, error.code)


def without_strict(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return tools as the model reads them: ``strict`` is said to the server."""
    return [
        {**tool, "function": {name: value for name, value in tool["function"].items() if name != "strict"}}
        if isinstance(tool.get("function"), Mapping)
        else dict(tool)
        for tool in tools
    ]


def messages_with_tools(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with ``function_call`` and the role ``function`` as ``tool_calls`` and the role ``tool``.

    Raises:
        RequestError: a result without a call, or both forms in one message.
    """
    converted: list[dict[str, Any]] = []
    open_id = ""
    for index, original in enumerate(messages):
        message = dict(original)
        call = message.pop("function_call", None)
        if call is not None:
            if message.get("tool_calls"):
                raise RequestError(f"messages[{index}]", "has tool_calls and function_call", "Keep one of them")
            open_id = f"function_call_{index}"
            message["tool_calls"] = [{"id": open_id, "type": "function", "function": call}]
        elif message.get("role") == "function":
            if not open_id:
                raise RequestError(f"messages[{index}]", "the result does not follow a function_call")
            message.pop("name", None)
            message |= {"role": "tool", "tool_call_id": open_id}
            open_id = ""
        converted.append(message)
    return converted
