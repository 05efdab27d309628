"""Refusals and failures in OpenAI's form."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from console import visible_lines
from errors import ConfigError, one_line
from serving.formats import TemplateOptions
from serving.requests import ClosedError, QueueFullError, RequestError, UnknownModelError, shown

_LOG = logging.getLogger(__name__)
_MOST_MESSAGE = 500  # characters
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# Seconds after which a client may try again.
_RETRY_AFTER = {429: "1", 503: "5"}
_MOST_PARAM = 200  # characters
# Arguments of the chat template beside the other fields of a body, as pydantic names them.
_MISPLACED = [("body", field.name) for field in fields(TemplateOptions)]
# What pydantic's types of errors say of a field.
_WORDS = {"extra_forbidden": "is not supported by this server", "missing": "is required"}
_NEEDED = {
    "bool_type": "true or false", "dict_type": "an object", "float_type": "a number", "int_type": "an integer",
    "finite_number": "a finite number", "greater_than_equal": "at least {ge}", "less_than_equal": "at most {le}",
    "list_type": "a list", "literal_error": "{expected}", "model_attributes_type": "an object",
    "model_type": "an object", "string_type": "a string",
}  # fmt: skip


class ApiError(Exception):
    """What a request ends with.

    Args:
        status: of HTTP.
        message: one line for the client.
        param: the field that is at fault, as OpenAI names it.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return OpenAI's object."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        message, param = visible_lines(self.message)[:_MOST_MESSAGE], self.param and self.param[:_MOST_PARAM]
        kind = _TYPES.get(self.status, default)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        added = {"Retry-After": _RETRY_AFTER[self.status]} if self.status in _RETRY_AFTER else {}
        if self.status == 401:
            added["WWW-Authenticate"] = "Bearer"
        return JsonResponse(self.body(), self.status, {**added, **(headers or {})})


class JsonResponse(Response):
    """A body of JSON. Half a surrogate pair, which text from a client may contain, is written as its escape."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json_bytes(content)


def json_bytes(content: Any) -> bytes:
    """Return a value as JSON in UTF-8."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def api_error(error: BaseException) -> ApiError:
    """Return what a client is told of an error. One that nobody expected is logged, and named without its text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownModelError):
        return ApiError(404, str(error), error.field, "model_not_found")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), error.field)
    if isinstance(error, ConfigError):
        return ApiError(400, str(error))
    if isinstance(error, QueueFullError):
        return ApiError(429, one_line(error) or "too many requests are waiting", code="queue_full")
    if isinstance(error, ClosedError):
        return ApiError(503, "the server is shutting down", code="closing")
    _LOG.error("%s: %s", type(error).__name__, one_line(error), exc_info=error if _LOG.isEnabledFor(10) else None)
    return ApiError(500, f"the server failed with {type(error).__name__}; its log says more", code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Answer every exception of an app in OpenAI's form."""

    async def answer(request: Request, error: Exception) -> Response:
        return api_error(error).response()

    async def answer_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {
            404: f"there is no {request.url.path}; docs/serving.md lists the addresses",
            405: "this address has another method",
            400: f"the body cannot be read: {_reason(error.__cause__)}",
        }.get(error.status_code)
        return ApiError(error.status_code, message or str(error.detail)).response(error.headers)

    async def answer_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return invalid_request(error.errors(), error.body).response()

    for kind in (ApiError, ConfigError, QueueFullError, ClosedError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(RequestValidationError, answer_invalid)


def _reason(error: BaseException | None) -> str:
    """Return why a body cannot be read: what FastAPI leaves out of its own message."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return one_line(error) if error is not None else "it cannot be parsed"


def invalid_request(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """Return the error of a body that is not as its schema says: its first fault, unknown fields before others."""
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if first["loc"] == ("body",) and not isinstance(body, dict):
        return ApiError(400, "the body must be a JSON object, with the header Content-Type: application/json")
    # A value of several types has an error for each of them; the one that is deepest in it was meant.
    same = [error for error in errors if error["loc"][:2] == first["loc"][:2]] if first["loc"][1:] else [first]
    paths = [_path(error, body) for error in same]
    param = max(paths, key=len)
    what = _fault([error for error, path in zip(same, paths, strict=True) if path == param])
    return ApiError(400, f"{param}: {what}" if param else what, param or None)


def _fault(errors: Sequence[Mapping[str, Any]]) -> str:
    """Return what is wrong with a field that has these errors."""
    needed = [_NEEDED[error["type"]].format(**error.get("ctx", {})) for error in errors if error["type"] in _NEEDED]
    if errors[0]["type"] == "extra_forbidden" and errors[0]["loc"] in _MISPLACED:
        return "is an argument of the chat template: /v1/chat/completions takes it in chat_template_kwargs"
    if needed:
        return f"must be {' or '.join(dict.fromkeys(needed))}, not {shown(errors[0]['input'])}"
    return _WORDS.get(errors[0]["type"]) or str(errors[0]["msg"]).removeprefix("Value error, ")


def _path(error: Mapping[str, Any], body: Any) -> str:
    """Return the field of an error as OpenAI names it: ``messages[0].content``."""
    path, value, named = "", body, 0
    for part in error["loc"][1:]:  # without "body"
        is_index = isinstance(part, int) and isinstance(value, list) and part < len(value)
        if is_index or (isinstance(value, dict) and part in value):
            path += f"[{part}]" if is_index else f".{part}"
            value, named = value[part], named + 1
        # Otherwise the part names one of the types that the value could have.
    if error["type"] == "missing" and named < len(error["loc"]) - 1:  # a field that is null has been named
        path += f".{error['loc'][-1]}"
    return path.removeprefix(".")
