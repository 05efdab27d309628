"""The original's ``chat`` and ``chat_stream``, and ``chat_batch``, for models of every family.

A family's mixin writes the prompt and says what ends an answer; ``generate`` does the rest. The answers of a batch are
those of each question alone: prompts are padded on the left and hidden by a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from chat.chatml import END_OF_TEXT, IM_END, IM_START
from errors import ConfigError
from qwen_model.kv_cache import build_cache

History = Sequence[Sequence[str]]
"""Pairs of query and answer, oldest first."""


class ChatMixin:
    """Methods of a model; ``chat_prompt`` and ``chat_stops`` are the family's."""

    if TYPE_CHECKING:
        config: Any
        generation_config: GenerationConfig

        @property
        def device(self) -> torch.device: ...

        def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    def chat_prompt(
        self, tokenizer: Any, query: str, history: History, system: str | None, window: int | None
    ) -> list[int]:
        """Return the ids that an answer continues.

        Args:
            system: system message; ``None``: the family's default.
            window: most ids of system message and history; the oldest exchanges are left out.
        """
        raise NotImplementedError

    def chat_stops(
        self, tokenizer: Any, stop_words_ids: list[list[int]] | None, config: GenerationConfig
    ) -> dict[str, Any]:
        """Return the arguments of ``generate`` that end an answer; settings may be changed in ``config``."""
        raise NotImplementedError

    def chat_text(self, tokenizer: Any, ids: list[int], is_complete: bool) -> str:
        """Return the text of the ids of an answer, without the control token that ended it.

        Args:
            is_complete: no more ids follow, so bytes of an incomplete character are shown as such.
        """
        if is_complete:
            return str(tokenizer.decode(ids, errors="replace"))
        return str(tokenizer.decode(ids, skip_special_tokens=True, errors="ignore"))

    def chat(
        self,
        tokenizer: Any,
        query: str,
        history: History | None = None,
        system: str | None = None,
        stream: bool | None = None,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        append_history: bool = True,
        **kwargs: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer ``query``.

        Args:
            system: system message; ``None``: the family's default.
            stream: refused if true; ``chat_stream`` yields the answer as it grows.
            stop_words_ids: id sequences that end the answer, besides those of the chat format.
            append_history: add this exchange to the history that is returned.
            kwargs: ``max_window_size``, the most ids of the history; ``kv_cache``, ``int8`` or ``fp8``; others are
                passed to ``generate``.

        Returns:
            The answer, and the history.
        """
        if stream:
            raise ConfigError("chat(stream=True) returns one answer", "Call chat_stream(...), which yields it in parts")
        answers, histories = self.chat_batch(
            tokenizer, [query], [history], system, stop_words_ids, generation_config, append_history, **kwargs
        )
        return answers[0], histories[0]

    def chat_batch(
        self,
        tokenizer: Any,
        queries: Sequence[str],
        histories: Sequence[History | None] | None = None,
        system: str | None = None,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        append_history: bool = True,
        **kwargs: Any,
    ) -> tuple[list[str], list[list[tuple[str, str]]]]:
        """Answer several queries at once, each with its own history; arguments as in ``chat``.

        Returns:
            The answers, and the histories.
        """
        earlier = [list(history or ()) for history in histories or [None] * len(queries)]
        if not queries or len(earlier) != len(queries):
            raise ValueError(f"{len(queries)} queries and {len(earlier)} histories: give one history for each query")
        inputs = self._chat_inputs(tokenizer, queries, earlier, system, stop_words_ids, generation_config, kwargs)
        output, width = self.generate(**inputs), inputs["input_ids"].shape[1]
        rows = output[:: len(output) // len(queries), width:].tolist()  # the first of several continuations
        answers = [self._whole_text(tokenizer, row, inputs["generation_config"]) for row in rows]
        pairs = [[(pair[0], pair[1]) for pair in history] for history in earlier]
        if append_history:
            pairs = [
                [*pair, exchange] for pair, exchange in zip(pairs, zip(queries, answers, strict=True), strict=True)
            ]
        return answers, pairs

    def chat_stream(
        self,
        tokenizer: Any,
        query: str,
        history: History | None = None,
        system: str | None = None,
        stop_words_ids: list[list[int]] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        """Like ``chat``, but yield the answer so far after each token, and at last what ``chat`` returns.

        Until then bytes of an incomplete character are held back. Closing the iterator ends the generation.
        """
        kwargs["logits_processor"] = logits_processor
        inputs = self._chat_inputs(
            tokenizer, [query], [history or ()], system, stop_words_ids, generation_config, kwargs
        )
        streamer = _IdStreamer()
        inputs["stopping_criteria"] = StoppingCriteriaList([*(inputs.get("stopping_criteria") or []), streamer.stopped])
        thread = Thread(target=streamer.run, args=(self.generate, inputs), daemon=True)
        thread.start()
        stops, ids, answer, shown = set(_control_ids(tokenizer)), list[int](), list[int](), None
        try:
            for id_ in streamer:
                ids.append(id_)
                if id_ not in stops:
                    answer.append(id_)
                    shown = self.chat_text(tokenizer, answer, False)
                    yield shown
            whole = self._whole_text(tokenizer, ids, inputs["generation_config"])
            if whole != shown:
                yield whole
        finally:
            streamer.stopped.is_set = True
            thread.join()

    def _whole_text(self, tokenizer: Any, row: list[int], config: GenerationConfig) -> str:
        """Return the text of a finished answer."""
        return self.chat_text(tokenizer, _answer_ids(row, tokenizer, config), True).strip()

    def _chat_inputs(
        self,
        tokenizer: Any,
        queries: Sequence[str],
        histories: Sequence[History],
        system: str | None,
        stop_words_ids: list[list[int]] | None,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Build the arguments of ``generate``; settings among ``kwargs`` go into a copy of the generation config."""
        config = deepcopy(generation_config or self.generation_config)
        window = kwargs.pop("max_window_size", None) or getattr(config, "max_window_size", None)
        kind = kwargs.pop("kv_cache", None)
        others = config.update(**kwargs)  # arguments that are not settings: streamer, logits processors
        stops = self.chat_stops(tokenizer, stop_words_ids, config)
        prompts = [
            self.chat_prompt(tokenizer, query, history, system, window)
            for query, history in zip(queries, histories, strict=True)
        ]
        if config.pad_token_id is None:
            config.pad_token_id = _control_ids(tokenizer)[-1]
        width = max(map(len, prompts))
        ids = [[config.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        inputs = {**others, "input_ids": ids, "attention_mask": mask}
        for name in ("input_ids", "attention_mask"):
            inputs[name] = torch.tensor(inputs[name], device=self.device)
        if kind is not None:
            inputs["past_key_values"] = build_cache(self.config, kind)
        if processors := [*(others.get("logits_processor") or ()), *stops.pop("logits_processor", ())]:
            inputs["logits_processor"] = LogitsProcessorList(processors)
        return {**inputs, **stops, "generation_config": config}


def check_history(history: History) -> None:
    """Raise unless a history consists of pairs of texts."""
    for pair in history:
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"each entry of history must be a pair of query and answer, not {pair!r}")


def _control_ids(tokenizer: Any) -> list[int]:
    """Return the ids of ``<|im_start|>``, ``<|im_end|>`` and end-of-text."""
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in (IM_START, IM_END, END_OF_TEXT)]


def _answer_ids(row: list[int], tokenizer: Any, config: GenerationConfig) -> list[int]:
    """Return the ids before the control token that ends an answer, or before the padding after it."""
    *stops, end_of_text = _control_ids(tokenizer)
    end = next((index for index, id_ in enumerate(row) if id_ in stops), len(row))
    if end == len(row):
        while end and row[end - 1] in (end_of_text, config.pad_token_id):
            end -= 1
    return row[:end]


class _Stopped(StoppingCriteria):
    """Ends all rows once ``is_set``."""

    is_set = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return torch.full(input_ids.shape[:1], self.is_set, dtype=torch.bool, device=input_ids.device)


class _IdStreamer(BaseStreamer):
    """Passes the ids of one generated row from the generating thread to the reading one, and its exception."""

    def __init__(self) -> None:
        self.queue: Queue[int | BaseException | None] = Queue()
        self.stopped = _Stopped()
        self.is_prompt = True

    def run(self, generate: Any, inputs: dict[str, Any]) -> None:
        try:
            generate(**inputs, streamer=self)
        except BaseException as error:
            self.queue.put(error)

    def put(self, value: Tensor) -> None:
        if not self.is_prompt:
            for id_ in value.flatten().tolist():
                self.queue.put(id_)
        self.is_prompt = False

    def end(self) -> None:
        self.queue.put(None)

    def __iter__(self) -> Iterator[int]:
        while (item := self.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
