"""``/v1/chat/completions``."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from chat.families import EMPTY_THOUGHT, Family
from chat.reading import AnswerReader, opening_of
from serving.api.chat_choice import Choice
from serving.api.errors import ApiError, JsonResponse, api_error
from serving.api.functions import in_older_form, messages_with_tools, tools_of_functions, without_strict
from serving.api.json_answers import Check, build_call_checks, build_check
from serving.api.running import (
    EventStream,
    Service,
    cancel_all,
    in_thread,
    note,
    pieces_of,
    sampling_of,
    submit_all,
    usage_of,
    watched,
)  # fmt: skip
from serving.api.schemas import ChatRequest, FunctionName, NamedTool
from serving.formats import OptionError, TemplateOptions
from serving.requests import RequestError
from serving.ticket import Ticket

if TYPE_CHECKING:
    from serving.engine import Engine

_LOG = logging.getLogger("serving.texts")


@dataclass(frozen=True)
class _Prompt:
    """A rendered conversation.

    Attributes:
        tools: those that the answer may call.
        opening: the start of the answer that it contains.
    """

    ids: tuple[int, ...]
    family: Family
    tools: Sequence[Mapping[str, Any]]
    opening: str


@dataclass(frozen=True)
class _Run:
    """A request whose answers are computed."""

    service: Service
    body: ChatRequest
    check: Check | None
    call_checks: Mapping[str, Check]
    tickets: list[Ticket]
    choices: list[Choice]
    head: dict[str, Any]  # fields of the response and of each chunk


async def create_chat_completion(service: Service, request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    run = await _start(service, body)
    if body.stream:
        return EventStream(_chunks(run, request), run.tickets)
    async with watched(request.receive, run.tickets):
        async for index, piece in pieces_of(service, run.tickets):
            run.choices[index].add(piece)
            if run.choices[index].is_full:
                run.tickets[index].cancel()
        choices = [
            {**await _finished(run, index), "logprobs": choice.take_logprobs()}
            for index, choice in enumerate(run.choices)
        ]
    usage = usage_of(run.tickets, body.n)
    _note(run, request, usage)
    return JsonResponse({**run.head, "object": "chat.completion", "choices": choices, "usage": usage})


async def _start(service: Service, body: ChatRequest) -> _Run:
    engine, id_ = service.engine, secrets.token_hex(12)
    adapter = engine.adapter_of(body.model)
    check = await in_thread(build_check, body.response_format, body.messages)
    call_checks, prompt = await in_thread(_render, service, body)
    form = prompt.family.tool_form
    stops = form.stops if form is not None and prompt.tools else ()
    sampling = sampling_of(
        body,
        service,
        body.max_tokens or body.max_completion_tokens,
        (body.top_logprobs or 0) if body.logprobs else None,
        stops,
    )
    tickets = submit_all(service, [prompt.ids], sampling, adapter, body.n)
    most_calls = 1 if body.functions or not body.parallel_tool_calls else None
    choices = [
        Choice(
            index,
            AnswerReader(prompt.family, prompt.tools, prompt.opening),
            id_,
            bool(body.functions),
            prompt.family.has_thinking,
            most_calls,
        )
        for index in range(body.n)
    ]
    head = {"id": f"chatcmpl-{id_}", "created": int(time.time()), "model": body.model}
    return _Run(service, body, check, call_checks, tickets, choices, head)


def _render(service: Service, body: ChatRequest) -> tuple[dict[str, Check], _Prompt]:
    """Return the checks of calls, and the prompt of a request.

    Raises:
        ApiError: what cannot be checked or rendered, by its name in the request.
    """
    tools = body.tools or tools_of_functions(body.functions or [])
    try:
        return build_call_checks(tools), _render_prompt(service, body, without_strict(tools))
    except OptionError as error:
        raise error.at(body.place_of(error.name)) from None
    except (ApiError, RequestError) as error:
        is_older = body.functions or body.function_call
        raise (in_older_form(api_error(error)) if is_older else error) from None


def _render_prompt(service: Service, body: ChatRequest, tools: Sequence[Mapping[str, Any]]) -> _Prompt:
    """Return the prompt. ``tool_choice`` and ``function_call`` decide how its answer begins."""
    engine, options, messages = service.engine, body.template_options, messages_with_tools(body.messages)
    choice = body.tool_choice or body.function_call or "auto"
    name = _forced_name(choice, tools)
    if choice != "auto" and choice != "none" and not tools:
        raise RequestError("tool_choice", "there are no tools to choose from")
    if choice == "none":
        tools = []
    is_forced = bool(tools) and (name is not None or choice == "required")
    if is_forced:
        options = _without_thinking(engine, options)
    family, ids = engine.family_of(options), engine.render(messages, tools, options=options)
    opening = opening_of(family, bool(tools), messages[-1].get("role") == "tool")
    forced = ""
    if is_forced and family.tool_form is not None:
        start = EMPTY_THOUGHT if family.has_thinking else ""
        forced = f"{start}{family.tool_form.call_start(name)}".removeprefix(opening)
        ids = (*ids, *engine.encode(forced))
    return _Prompt(ids, family, tools, opening + forced)


def _without_thinking(engine: Engine, options: TemplateOptions) -> TemplateOptions:
    """Return options whose prompt leads to an answer without thinking, where the model's template has one."""
    without = replace(options, enable_thinking=False)
    try:
        engine.family_of(without)
    except OptionError:
        return options
    return without


def _forced_name(choice: str | NamedTool | FunctionName, tools: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the name of the function that has to be called, if the request says so."""
    if isinstance(choice, str):
        return None
    name = choice.function.name if isinstance(choice, NamedTool) else choice.name
    names = [tool["function"].get("name") for tool in tools if isinstance(tool.get("function"), dict)]
    if name not in names:
        raise RequestError("tool_choice", "names a function that is not among the tools")
    return name


async def _chunks(run: _Run, request: Request) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of a stream."""
    wants_usage = run.body.includes_usage
    head = {**run.head, "object": "chat.completion.chunk", **({"usage": None} if wants_usage else {})}

    def chunk(choice: Choice, delta: dict[str, Any], **ending: Any) -> dict[str, Any]:
        written = {"index": choice.index, "delta": delta, "finish_reason": None, **ending}
        logprobs = choice.take_logprobs()
        return {**head, "choices": [{**written, "logprobs": logprobs}]}

    for choice in run.choices:
        yield chunk(choice, {"role": "assistant", "content": ""})
    async for index, piece in pieces_of(run.service, run.tickets):
        choice = run.choices[index]
        for delta in choice.add(piece):
            yield chunk(choice, delta)
        if choice.is_full:
            run.tickets[index].cancel()
        if piece is None:
            await _finished(run, index)
            yield chunk(choice, {}, **choice.ending(run.tickets[index].finish_reason))
    usage = usage_of(run.tickets, run.body.n)
    _note(run, request, usage)
    if wants_usage:
        yield {**head, "choices": [], "usage": usage}


async def _finished(run: _Run, index: int) -> dict[str, Any]:
    """Return a finished choice.

    Raises:
        ApiError: it does not have the format that the request asks for, or a call not the parameters of its function.
    """
    choice = run.choices[index]
    finished = choice.whole(run.tickets[index].finish_reason)
    checked: list[tuple[Check | None, str]] = []
    if finished["finish_reason"] == "stop":
        checked = [(run.check, choice.message["content"])]
    elif finished["finish_reason"] in ("tool_calls", "function_call"):
        checked = [(run.call_checks.get(call["name"]), call["arguments"]) for call in choice.calls]
    for check, text in checked:
        if check is not None:
            try:
                await in_thread(check, text)
            except ApiError:
                cancel_all(run.tickets)
                raise
    return finished


def _note(run: _Run, request: Request, usage: dict[str, int]) -> None:
    note(request, f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens")
    if run.service.settings.log_requests:
        _LOG.info("%s -> %s", run.body.messages, [choice.message for choice in run.choices])
