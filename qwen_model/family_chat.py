"""``chat``, ``chat_stream`` and ``chat_batch`` for families later than Qwen v1, as methods and as functions.

Models that the toolkit loads have the methods. The functions take any model: one of transformers' own classes, one
with an adapter of peft, or a Qwen v1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig

from chat.chatml import IM_START
from chat.detect import family_of
from chat.families import Family
from chat.render import encode_prompt, render_prompt
from chat.stops import end_ids_of
from chat.turns import Turn
from errors import ConfigError
from qwen_model.architectures import architecture_of
from qwen_model.chat_methods import ChatMixin, History, check_history
from qwen_model.generation import StopWordsLogitsProcessor

_families: dict[tuple[str, str | None], Family] = {}


class FamilyChatMixin(ChatMixin):
    """Prompts by the checkpoint's chat template, and ends of answers. Thinking is part of an answer's text."""

    def chat_prompt(
        self, tokenizer: Any, query: str, history: History, system: str | None, window: int | None
    ) -> list[int]:
        check_history(history)
        family, pairs = self._family(tokenizer), list(history)
        while True:
            texts = [turn for question, answer in pairs for turn in (Turn("user", question), Turn("assistant", answer))]
            ids = encode_prompt(render_prompt([*texts, Turn("user", query)], family, system), tokenizer)
            if not pairs or window is None or len(ids) <= window:
                return ids
            del pairs[0]

    def chat_stops(
        self, tokenizer: Any, stop_words_ids: list[list[int]] | None, config: GenerationConfig
    ) -> dict[str, Any]:
        ends = end_ids_of(tokenizer, self._family(tokenizer).stops)
        if not ends:
            raise ConfigError("the tokenizer has no <|im_end|>, which ends answers", "Use a chat model of Qwen")
        known = config.eos_token_id
        own = known if isinstance(known, list) else [] if known is None else [known]
        config.eos_token_id = [*dict.fromkeys([*own, *ends, int(tokenizer.convert_tokens_to_ids(IM_START))])]
        return {"logits_processor": [StopWordsLogitsProcessor(stop_words_ids, ends[-1])]} if stop_words_ids else {}

    def chat_text(self, tokenizer: Any, ids: list[int], is_complete: bool) -> str:
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        # The prompt of some families opens the thinking, which is part of the answer.
        opening = self._family(tokenizer).prompt_suffix
        return opening + (text if is_complete else text.rstrip("\ufffd"))

    def _family(self, tokenizer: Any) -> Family:
        base_system = architecture_of(self.config.model_type).base_system
        key = str(getattr(tokenizer, "chat_template", None)), base_system
        if key not in _families:  # rendering the probes takes a process of its own
            _families[key] = family_of(tokenizer, base_system)
        return _families[key]


class _WithMethods(FamilyChatMixin):
    """Methods for a model whose class has none."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def chat(
    model: Any, tokenizer: Any, query: str, history: History | None = None, **kwargs: Any
) -> tuple[str, list[tuple[str, str]]]:
    """Answer ``query`` with a model of any family; see ``ChatMixin.chat``."""
    answer, exchanges = _methods_of(model).chat(tokenizer, query, history, **kwargs)
    return answer, exchanges


def chat_stream(model: Any, tokenizer: Any, query: str, history: History | None = None, **kwargs: Any) -> Iterator[str]:
    """Yield the answer to ``query`` as it grows; see ``ChatMixin.chat_stream``."""
    stream: Iterator[str] = _methods_of(model).chat_stream(tokenizer, query, history, **kwargs)
    return stream


def chat_batch(
    model: Any, tokenizer: Any, queries: list[str], histories: list[History | None] | None = None, **kwargs: Any
) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Answer several queries at once; see ``ChatMixin.chat_batch``."""
    answers, exchanges = _methods_of(model).chat_batch(tokenizer, queries, histories, **kwargs)
    return answers, exchanges


def _methods_of(model: Any) -> Any:
    return model if hasattr(model, "chat") else _WithMethods(model)
