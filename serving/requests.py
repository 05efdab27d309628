"""What an engine is asked, and what it answers: plain data, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

from errors import ConfigError

FinishReason = Literal["stop", "length", "cancelled", "timeout"]
"""Why an answer ended: a stop token or string, its length limit, the client, or the time limit of requests."""

MOST_LOGPROBS = 20
"""Most alternatives of a token that a request can ask for, as in OpenAI's API."""


_MOST_SHOWN = 60  # characters


def shown(value: object) -> str:
    """Return a value of a request for a message: the beginning of its JSON."""
    text = ""
    for part in json.JSONEncoder(ensure_ascii=False, skipkeys=True, default=repr).iterencode(value):
        text += part[: _MOST_SHOWN + 1]
        if len(text) > _MOST_SHOWN:
            return f"{text[:_MOST_SHOWN]}..."
    return text


class RequestError(ConfigError):
    """A request that cannot be answered as it is.

    Args:
        field: the request's field as OpenAI names it, such as ``messages[1].content``.
        what: what is wrong with it.
        fix: what to do instead.
    """

    def __init__(self, field: str, what: str, fix: str = "") -> None:
        super().__init__(f"{field}: {what}", fix)
        self.field = field


class UnknownModelError(RequestError):
    """A model or adapter that the engine has not loaded."""


BASE = "base"
"""Name of the model without an adapter, in a terminal chat."""


def check_adapter_names(folders: Mapping[str, str], model_name: str | None = None) -> None:
    """Raise ``ConfigError`` for adapters that requests could not name.

    Args:
        folders: of the adapters, by their names.
        model_name: of the base, if it is known.
    """
    for name, folder in folders.items():
        if not name or name == BASE or ":" in name or not name.isprintable():
            what = f"--adapter {name}={folder}: {name or 'an empty text'} cannot be its name"
            raise ConfigError(what, f"Give one without a colon, not {BASE}")
        if name == model_name:
            raise ConfigError(f"--adapter {name}={folder}: {name} is the model's name", "Give it another name")


class QueueFullError(Exception):
    """More requests wait than the engine allows; the client may try again later."""


class ClosedError(Exception):
    """The engine is closing and takes no more requests."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen. ``None`` takes the value of the checkpoint, else that of its family.

    Attributes:
        temperature: 0 takes the most likely token each time.
        top_p: of the most likely tokens, those are drawn from that together have this probability.
        top_k: number of the most likely tokens that are drawn from; 0: all, for which vLLM's clients say -1.
        repetition_penalty: divides the scores of tokens of prompt and answer; 1 has no effect.
        presence_penalty: subtracted from the scores of tokens of the answer so far.
        frequency_penalty: subtracted as many times as the token is in the answer so far.
        seed: equal seeds give equal answers, whatever else is answered; ``None`` draws one.
        max_tokens: length limit of the answer; without any value what is left of the context.
        stop: texts that end the answer, which does not contain them.
        logprobs: number of most likely tokens that are returned for each token (0: the token's own); ``None``: none.
        ignore_end: continue after the tokens that end an answer, up to ``max_tokens``: for measurements.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_end: bool = False

    def __post_init__(self) -> None:
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and least <= value <= most):
                raise RequestError(name, f"must be a number from {least} to {most}, not {shown(value)}")
        if not all(self.stop):
            raise RequestError("stop", "a stop text is empty")

    def filled(self, defaults: Sampling) -> Sampling:
        """Return these values, with those of ``defaults`` where there are none."""
        names = [item.name for item in fields(self) if getattr(self, item.name) is None]
        return replace(self, **{name: getattr(defaults, name) for name in names})


# Both ends included.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100), "top_p": (0, 1), "top_k": (0, 1 << 20), "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "seed": (-(1 << 63), (1 << 64) - 1),
    "max_tokens": (1, 1 << 30), "logprobs": (0, MOST_LOGPROBS),
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is answered.

    Attributes:
        prompt_ids: see ``Engine.render`` and ``Engine.encode``.
        adapter: name of a loaded adapter; ``None``: the base.
        timeout: seconds from its submission until its answer ends as it is; ``None``: the engine's.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling = Sampling()
    adapter: str | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """The logarithm of a token's probability, before temperature and penalties.

    Attributes:
        token_id: the token.
        bytes: its bytes, of which text may need those of the next token.
        logprob: the logarithm.
        top: the most likely tokens at its position, most likely first; their own ``top`` is empty.
    """

    token_id: int
    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """Return its bytes as text, with U+FFFD for what is not UTF-8."""
        return self.bytes.decode("utf-8", "replace")


@dataclass(frozen=True)
class Piece:
    """A part of an answer: whole characters, and the tokens that were chosen since the piece before.

    Attributes:
        text: may be empty in the last piece.
        logprobs: of its tokens, if the request asks for them.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of a request; those of the answer include the one that ends it."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    usage: Usage
    finish_reason: FinishReason


@dataclass(frozen=True)
class Load:
    """What an engine is doing.

    Attributes:
        running: requests that are being answered.
        waiting: requests in the queue.
        answered: requests that have ended since the start.
        prompt_tokens, completion_tokens: computed since the start.
    """

    running: int
    waiting: int
    answered: int
    prompt_tokens: int
    completion_tokens: int
