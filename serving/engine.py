"""The engine: one thread that owns a model and answers all requests together."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chat.families import Family
from chat.render import control_ids_of, plain_encoder
from chat.template_arguments import template_text
from chat.turns import Tool, Turn
from errors import ConfigError, RunError
from serving.formats import Formats, TemplateOptions
from serving.rendering import check_tools, parse_messages, render_turns
from serving.requests import (
    ClosedError,
    Load,
    QueueFullError,
    Request,
    RequestError,
    UnknownModelError,
    check_adapter_names,
)
from serving.ticket import Ticket

logger = logging.getLogger(__name__)
_DEFAULT = TemplateOptions()


class Engine:
    """A loaded model with its adapters, and the requests that it answers.

    Attributes:
        model_name: the name of the base, for ``model`` of a request: the last part of its path.
        adapters: names of the loaded adapters.
        family: the checkpoint's chat format; :meth:`family_of` gives those with arguments of its template.
        tokenizer: the checkpoint's tokenizer.
        context_length: most tokens of prompt and answer together.
        model: the base, whose layers have the adapters. Only the engine's thread may call it while requests run.
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
        model_name: str | None = None,
        chat_template: str | None = None,
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
            model_name: the name of the base; ``None``: the last part of its path.
            chat_template: file with a template that replaces the checkpoint's; ``None``: that of the adapters.

        Raises:
            ConfigError: checkpoint or adapter cannot be used.
        """
        from loading.checkpoint import load_checkpoint
        from loading.inference import load_for_inference
        from qwen_model.answer_blocks import use_answer_blocks
        from serving.adapters import loading_order

        model_name = model_name or Path(model_name_or_path).absolute().name or model_name_or_path
        check_adapter_names(adapters or {}, model_name)
        ordered = loading_order(adapters or {})
        inner = {name: f"adapter{index}" for index, name in enumerate(ordered)}
        checkpoint = load_checkpoint(model_name_or_path, chat_template=chat_template, adapters=list(ordered.values()))
        folders = {inner[name]: folder for name, folder in ordered.items()}
        model = load_for_inference(checkpoint, any_base=any_base, others=folders, device_map=device_map)
        use_answer_blocks(model)
        return cls(
            checkpoint, model, inner, kv_cache=kv_cache, max_concurrency=max_concurrency, queue_size=queue_size,
            request_timeout=request_timeout, context_length=context_length, model_name=model_name,
        )  # fmt: skip

    def __init__(
        self,
        checkpoint: Any,
        model: Any,
        adapters: Mapping[str, str] | None = None,
        *,
        kv_cache: str | None = None,
        max_concurrency: int = 16,
        queue_size: int = 256,
        request_timeout: float | None = None,
        context_length: int | None = None,
        model_name: str | None = None,
    ) -> None:
        """Start an engine for a model that is loaded; arguments are those of :meth:`load`.

        Args:
            checkpoint: a ``loading.checkpoint.Checkpoint``.
            adapters: names of the adapters in ``model`` by the names that requests use.
        """
        from functools import partial

        from loading.chat_family import chat_family
        from serving.adapters import Adapters
        from serving.batch import Runner
        from serving.sampling import default_sampling
        from serving.scheduler import Scheduler
        from serving.text_stream import TokenBytes

        config = model.config
        self.model_name = model_name or Path(checkpoint.name).name or checkpoint.name
        self.family, self.tokenizer = checkpoint.family, checkpoint.tokenizer
        detect = partial(chat_family, checkpoint.model_type, self.tokenizer)
        template = "" if checkpoint.model_type == "qwen" else template_text(self.tokenizer)
        self._formats = Formats(self.family, detect, template)
        positions = int(config.max_position_embeddings)
        self.context_length = context_length or positions
        if self.context_length > positions:
            logger.warning(
                "--max_model_len %d: the model has %d positions; longer answers may be nonsense",
                self.context_length, positions,
            )  # fmt: skip
        self._encode_text = plain_encoder(self.tokenizer)
        try:
            self.defaults = default_sampling(checkpoint.generation_config, self.family)
        except RequestError as error:
            raise ConfigError(f"{checkpoint.folder / 'generation_config.json'}: {error}") from error
        self._end_ids = _end_ids(checkpoint)
        self._token_bytes = TokenBytes(self.tokenizer)
        runner_adapters = Adapters(model, adapters or {})
        self.adapters = runner_adapters.names
        self.model = model.get_base_model() if adapters else model
        self._scheduler = Scheduler(Runner(self.model, runner_adapters, kv_cache), max_concurrency)
        self._queue_size, self._timeout = queue_size, request_timeout
        self._condition = threading.Condition()
        self._waiting: deque[Any] = deque()
        self._closing = self._drains = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ----------------------------------------------------------------------------------------------------- requests

    def adapter_of(self, model: str) -> str | None:
        """Return the adapter that ``model`` of a request means: the base's name, an adapter's, or ``base:adapter``.

        Raises:
            UnknownModelError: no such model is loaded.
        """
        if model == self.model_name:
            return None
        name = model.removeprefix(f"{self.model_name}:")
        if name not in self.adapters:
            known = ", ".join([self.model_name, *self.adapters])
            raise UnknownModelError("model", f"{model!r} is not loaded", f"Use one of {known}")
        return name

    def family_of(self, options: TemplateOptions) -> Family:
        """Return the chat format with arguments of the checkpoint's template.

        Raises:
            OptionError: it has no such format, by the argument's name.
        """
        return self._formats.family(options)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        system: str | None = None,
        options: TemplateOptions = _DEFAULT,
    ) -> tuple[int, ...]:
        """Return the ids of the prompt for the next answer of a conversation.

        Args:
            messages: in OpenAI's form.
            tools: in OpenAI's form.
            system: system message of a conversation without one; ``None``: that of the family.
            options: arguments of the checkpoint's template.

        Raises:
            RequestError: what the family cannot write, by the field's name.
        """
        turns = parse_messages(messages, self.family_of(options))
        return self.render_turns(turns, check_tools(tools), system, options)

    def render_turns(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Tool] = (),
        system: str | None = None,
        options: TemplateOptions = _DEFAULT,
    ) -> tuple[int, ...]:
        """Return the ids of a prompt, as :meth:`render`, from turns that were checked."""
        return render_turns(turns, tools, self.family_of(options), self.tokenizer, system)

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of a plain text; control tokens in it stay text."""
        return tuple(self._encode_text(text))

    def submit(self, request: Request) -> Ticket:
        """Queue a request.

        Raises:
            RequestError: the prompt is empty or too long, or an unknown adapter.
            QueueFullError: ``queue_size`` requests wait.
            ClosedError: the engine is closing.
        """
        ticket = Ticket(request, self._wake)
        row = self._row_of(ticket)
        with self._condition:
            if self._closing:
                raise ClosedError("the engine is closing")
            # A request that can begin at once does not wait.
            if len(self._waiting) >= self._queue_size + max(0, self._scheduler.free):
                raise QueueFullError(f"the queue is full: {self._queue_size} requests may wait")
            self._waiting.append(row)
            self._condition.notify()
        return ticket

    def _row_of(self, ticket: Ticket) -> Any:
        from dataclasses import replace

        from serving.row import Row
        from serving.sampling import RowSampler

        request = ticket.request
        if request.adapter is not None and request.adapter not in self.adapters:
            raise UnknownModelError("model", f"the adapter {request.adapter!r} is not loaded")
        room = self.context_length - len(request.prompt_ids)
        if not request.prompt_ids:
            raise RequestError("messages", "the prompt is empty")
        if room < 1:
            what = f"the prompt has {len(request.prompt_ids)} tokens, and the context {self.context_length}"
            raise RequestError("messages", what, "Shorten the conversation")
        sampling = request.sampling.filled(self.defaults)
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens or room, room))
        timeout = self._timeout if request.timeout is None else request.timeout
        sampler = RowSampler(sampling, request.prompt_ids)
        return Row(ticket, sampler, self._token_bytes, self._end_ids, timeout)

    def load_now(self) -> Load:
        """Return what the engine is doing."""
        scheduler = self._scheduler
        return Load(scheduler.running, len(self._waiting), scheduler.answered, *scheduler.tokens)

    def close(self, drain: bool = True) -> None:
        """Take no more requests, end those that there are, and wait for the thread.

        Args:
            drain: answer them first; otherwise they end as they are, with the finish reason ``cancelled``.
        """
        with self._condition:
            self._drains = drain if not self._closing else self._drains and drain
            self._closing = True
            self._condition.notify()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(drain=False)

    # ------------------------------------------------------------------------------------------------------- thread

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify()

    def _run(self) -> None:
        """Answer requests until the engine is closed."""
        import torch

        with torch.inference_mode():
            while self._wait():
                try:
                    self._turn()
                except Exception as error:  # a fault of the engine itself: its requests end, later ones are answered
                    logger.exception("the engine failed, and begins again")
                    self._scheduler.fail_all(RunError(f"the engine failed: {type(error).__name__}"))

    def _wait(self) -> bool:
        """Wait for something to do; return false if the engine is closed and nothing is left."""
        with self._condition:
            while not self._waiting and not self._scheduler.running:
                if self._closing:
                    return False
                self._condition.wait()
            return True

    def _turn(self) -> None:
        scheduler = self._scheduler
        if self._closing and not self._drains:
            self._end_waiting(everyone=True)
            scheduler.end_all()
            return
        self._end_waiting()
        scheduler.end_overdue()
        if scheduler.wants_rows and self._waiting:
            with self._condition:
                rows = scheduler.choose(list(self._waiting))
                for row in rows:
                    self._waiting.remove(row)
                scheduler.begin(rows)
        failed = scheduler.turn()
        with self._condition:
            self._waiting.extendleft(reversed(failed))

    def _end_waiting(self, everyone: bool = False) -> None:
        """End requests whose clients have left, or whose time is over, before they began."""
        with self._condition:
            ended = [(row, "cancelled" if everyone else row.overdue()) for row in self._waiting]
            self._waiting = deque(row for row, reason in ended if reason is None)
        for row, reason in ended:
            if reason is not None:
                row.end(reason)


def _end_ids(checkpoint: Any) -> frozenset[int]:
    """Return the ids that end an answer: those of generation_config.json, and the control tokens of ChatML.

    Another format may have control tokens within its answers.
    """
    eos = checkpoint.generation_config.eos_token_id
    given = eos if isinstance(eos, list) else [] if eos is None else [eos]
    control = () if checkpoint.family.own_template else control_ids_of(checkpoint.tokenizer).values()
    return frozenset([*given, *checkpoint.end_ids, *control])
