"""The engine: one thread that owns a model and answers all requests together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chat.families import Family
from serving.requests import Load, Request
from serving.ticket import Ticket


class Engine:
    """A loaded model with its adapters, and the requests that it answers.

    Attributes:
        model_name: the name of the base, for ``model`` of a request: the last part of its path.
        adapters: names of the loaded adapters.
        family: the checkpoint's chat format.
        tokenizer: the checkpoint's tokenizer.
        context_length: most tokens of prompt and answer together.
    """

    model_name: str
    adapters: tuple[str, ...]
    family: Family
    tokenizer: Any
    context_length: int

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        adapters: Mapping[str, str] | None = None,
        *,
        device_map: str | Mapping[str, Any] | None = None,
        kv_cache: str | None = None,
        max_concurrency: int = 16,
        queue_size: int = 256,
        request_timeout: float | None = None,
        context_length: int | None = None,
        any_base: bool = False,
    ) -> Engine:
        """Load a checkpoint and adapters, and start the engine.

        Args:
            adapters: folders of adapters by the names that requests use.
            device_map: ``auto`` spreads the model over all GPUs; or as in ``from_pretrained``. ``None``: one GPU, or
                the CPU.
            kv_cache: ``int8`` or ``fp8`` keeps keys and values in 8 bits; ``None`` in the model's precision.
            max_concurrency: requests that are answered at the same time.
            queue_size: requests that can wait for a place.
            request_timeout: seconds from a request's submission until its answer ends as it is.
            context_length: most tokens of prompt and answer; ``None``: ``max_position_embeddings`` of config.json.
            any_base: accept adapters that were trained on other weights, with a warning.

        Raises:
            ConfigError: checkpoint or adapter cannot be used.
        """
        raise NotImplementedError

    def adapter_of(self, model: str) -> str | None:
        """Return the adapter that ``model`` of a request means: the base's name, an adapter's, or ``base:adapter``.

        Raises:
            UnknownModelError: no such model is loaded.
        """
        raise NotImplementedError

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        system: str | None = None,
        thinking: bool | None = None,
    ) -> tuple[int, ...]:
        """Return the ids of the prompt for the next answer of a conversation.

        Args:
            messages: in OpenAI's form.
            tools: in OpenAI's form.
            system: system message of a conversation without one; ``None``: that of the family.
            thinking: whether the answer begins with thinking; ``None``: as the checkpoint does by default.

        Raises:
            RequestError: what the family cannot write, by the field's name.
        """
        raise NotImplementedError

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of a plain text; control tokens in it stay text."""
        raise NotImplementedError

    def submit(self, request: Request) -> Ticket:
        """Queue a request.

        Raises:
            RequestError: the prompt is empty or too long, or an unknown adapter.
            QueueFullError: ``queue_size`` requests wait.
            ClosedError: the engine is closing.
        """
        raise NotImplementedError

    def load_now(self) -> Load:
        """Return what the engine is doing."""
        raise NotImplementedError

    def close(self, drain: bool = True) -> None:
        """Take no more requests, end those that there are, and wait for the thread.

        Args:
            drain: answer them first; otherwise they end as they are, with the finish reason ``cancelled``.
        """
        raise NotImplementedError
