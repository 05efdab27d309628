"""Prompts, stop words and answers of Qwen v1: ``make_context``, ``decode_tokens``, and what ``chat`` needs of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from chat.chatml import DEFAULT_SYSTEM, END_OF_TEXT, IM_END, IM_START, MAX_WINDOW_SIZE
from errors import ConfigError
from qwen_model.chat_methods import ChatMixin, History, check_history
from qwen_model.kv_cache import build_cache
from qwen_model.prompts import Prompt, Segment
from qwen_model.tokenization_qwen import QWenTokenizer

_FORCED = float(2**15)  # score that the original gives the end-of-text token to force it


def make_context(
    tokenizer: QWenTokenizer,
    query: str,
    history: History | None = None,
    system: str = "",
    max_window_size: int = MAX_WINDOW_SIZE,
    chat_format: str = "chatml",
) -> tuple[Prompt, list[int]]:
    """Build the prompt for an answer to ``query``, as text and as ids; ``tokenizer(text)`` gives the same ids.

    Of the history, the newest exchanges are kept that fit into ``max_window_size`` ids together with the system
    message; the query is not counted and never cut.

    Args:
        history: pairs of query and answer, oldest first.
        chat_format: ``chatml``, or ``raw`` for a base model: the query unchanged, with special tokens recognised.
    """
    if chat_format == "raw":
        return Prompt.parse(query), tokenizer.encode(query, allowed_special="all")
    _check_chat_format(chat_format)
    check_history(history or ())
    messages = [_message(tokenizer, "system", system)]
    used = len(messages[0][1])
    for question, answer in reversed(history or ()):
        exchange = [_message(tokenizer, "user", question), _message(tokenizer, "assistant", answer)]
        used += sum(len(ids) for _, ids in exchange)
        if used > max_window_size:  # the original compares with >= but counts one newline less
            break
        messages[1:1] = exchange
    messages.append(_message(tokenizer, "user", query))
    opening = Prompt([(IM_START, True), ("assistant\n", False)])
    messages.append((opening, tokenizer.encode_prompt(opening)))
    prompt = Prompt(segment for message, _ in messages for segment in message.segments)
    return prompt, [id_ for _, ids in messages for id_ in ids]


def _message(tokenizer: QWenTokenizer, role: str, content: str) -> tuple[Prompt, list[int]]:
    """A message as text and ids. Header and content are tokenised separately, as ``chat.render`` does in training."""
    segments: list[Segment] = [(IM_START, True), (f"{role}\n", False), (str(content), False), (IM_END, True)]
    prompt = Prompt([*segments, ("\n", False)])
    return prompt, tokenizer.encode_prompt(prompt)


def get_stop_words_ids(chat_format: str, tokenizer: QWenTokenizer) -> list[list[int]]:
    """Return the id sequences that end an answer."""
    if chat_format == "raw":
        return [tokenizer.encode_plain("Human:"), [tokenizer.eod_id]]
    _check_chat_format(chat_format)
    return [[tokenizer.im_end_id], [tokenizer.im_start_id]]


def decode_tokens(
    tokens: Tensor | Sequence[int],
    tokenizer: QWenTokenizer,
    raw_text_len: int,
    context_length: int,
    chat_format: str,
    verbose: bool = False,
    return_end_reason: bool = False,
    errors: str = "replace",
) -> Any:
    """Decode the answer from the ids of a prompt and its continuation.

    Args:
        tokens: ids of the prompt and of the answer.
        raw_text_len: number of characters that the prompt decodes to.
        context_length: number of ids of the prompt.
        verbose: print the whole text, and why the answer ended.
        return_end_reason: also return why the answer ended.
    """
    ids = [int(id_) for id_ in tokens]
    if chat_format == "raw":
        answer, reason = str(tokenizer.decode(ids, errors=errors))[raw_text_len:], f"Gen length {len(ids)}"
        for stop_word in ("Human:", END_OF_TEXT):
            answer = answer.replace(stop_word, "").strip()
    else:
        _check_chat_format(chat_format)
        stops = {tokenizer.im_start_id, tokenizer.im_end_id}
        stop = next((index for index in range(context_length, len(ids)) if ids[index] in stops), None)
        # Without a stop token every id belongs to the answer, except a final end-of-text.
        end = stop if stop is not None else len(ids) - (len(ids) > context_length and ids[-1] == tokenizer.eod_id)
        answer = str(tokenizer.decode(ids[:end], errors=errors))[raw_text_len:].strip()
        reason = f"Gen length {len(ids)}" if stop is None else f"Gen {tokenizer.decode([ids[stop]])!r}"
    if verbose:
        print(f"{tokenizer.decode(ids, errors=errors)}\n\nEnd reason: {reason}")
    return (answer, reason) if return_end_reason else answer


class StopWordsLogitsProcessor(LogitsProcessor):
    """Forces ``eos_token_id`` in each row that ends with one of the stop words.

    Args:
        stop_words_ids: id sequences; one that is ``eos_token_id`` alone is ignored.
    """

    def __init__(self, stop_words_ids: Sequence[Sequence[int]], eos_token_id: int) -> None:
        if not isinstance(stop_words_ids, list) or not stop_words_ids:
            raise ValueError(
                f"stop_words_ids must be a list of lists of ids with at least one entry, not {stop_words_ids!r}"
            )
        for word in stop_words_ids:
            if not isinstance(word, list) or not word:
                raise ValueError(f"stop_words_ids must be a list of non-empty lists of ids, not {stop_words_ids!r}")
            if any(not isinstance(id_, int) or isinstance(id_, bool) or id_ < 0 for id_ in word):
                raise ValueError(f"each entry of stop_words_ids must be a list of ids >= 0, not {word!r}")
        self.stop_words = [list(word) for word in stop_words_ids if list(word) != [eos_token_id]]
        self.eos_token_id = eos_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        stopped = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=scores.device)
        for word in self.stop_words:
            if len(word) <= input_ids.shape[1]:
                tail = input_ids[:, -len(word) :]
                stopped |= (tail == torch.tensor(word, device=tail.device)).all(-1).to(scores.device)
        scores = scores.clone()
        scores[stopped, self.eos_token_id] = _FORCED
        return scores


class QWenChatMixin(ChatMixin):
    """The original's ``generate`` with stop words, and its prompts and stops of ``chat``, for ``QWenLMHeadModel``."""

    def generate(self, *args: Any, stop_words_ids: list[list[int]] | None = None, **kwargs: Any) -> Any:
        """Call transformers' ``generate``; generation ends after any id sequence of ``stop_words_ids``."""
        config = kwargs.get("generation_config") or self.generation_config
        if stop_words_ids is None:
            stop_words_ids = getattr(config, "stop_words_ids", None)
        if stop_words_ids is not None:
            eos = kwargs.get("eos_token_id", config.eos_token_id)
            # With several end tokens the last one is end-of-text.
            processor = StopWordsLogitsProcessor(stop_words_ids, eos[-1] if isinstance(eos, (list, tuple)) else eos)
            kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or []), processor])
        kind, uses_cache = self.config.cache_kind, kwargs.get("use_cache", config.use_cache)
        if kind is not None and uses_cache is not False and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = build_cache(self.config, kind)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def chat_prompt(
        self, tokenizer: QWenTokenizer, query: str, history: History, system: str | None, window: int | None
    ) -> list[int]:
        written = DEFAULT_SYSTEM if system is None else system
        return make_context(tokenizer, query, history, written, window or MAX_WINDOW_SIZE)[1]

    def chat_stops(
        self, tokenizer: QWenTokenizer, stop_words_ids: list[list[int]] | None, config: GenerationConfig
    ) -> dict[str, Any]:
        if (chat_format := getattr(config, "chat_format", "chatml")) != "chatml":
            raise ConfigError(
                f"generation_config.json: chat_format {chat_format!r} is that of a base model, chat() needs chatml",
                "Use a chat model, or generate() with make_context(chat_format='raw')",
            )
        return {"stop_words_ids": [*_stop_words(stop_words_ids, tokenizer), *get_stop_words_ids("chatml", tokenizer)]}


def _stop_words(words: list[list[int]] | None, tokenizer: QWenTokenizer) -> list[list[int]]:
    """Return stop words with control tokens in place of their characters' ids, as ``encode("<|im_end|>")`` gives."""
    if not words:
        return []
    control = {tuple(tokenizer.encode_plain(token)): [id_] for token, id_ in tokenizer.special_tokens.items()}
    return [control.get(tuple(word), word) if isinstance(word, (list, tuple)) else word for word in words]


def _check_chat_format(chat_format: str) -> None:
    if chat_format != "chatml":
        raise ConfigError(f"chat_format {chat_format!r} is unknown", "Use 'chatml' or 'raw'")
