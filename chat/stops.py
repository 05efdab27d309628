"""What ends an answer: the tokens, and the ``generation_config.json`` that names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chat.families import END_OF_TEXT, IM_END

MAX_WINDOW_SIZE = 6144
"""Default of Qwen v1's ``max_window_size``: tokens of the prompt that ``chat()`` keeps."""


def end_ids_of(tokenizer: Any) -> list[int]:
    """Ids that end an answer: ``<|im_end|>`` and end-of-text, the latter last; empty where one of them is missing."""
    tokens = [IM_END, END_OF_TEXT]
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    # For a token that they do not have some tokenizers give the id of the unknown one.
    return ids if None not in ids and tokenizer.convert_ids_to_tokens(ids) == tokens else []


def stopping_generation_config(config: Mapping[str, Any], end_ids: Sequence[int], model_type: str) -> dict[str, Any]:
    """The values of ``generation_config.json`` for a model that was tuned on ChatML.

    Args:
        config: the values of the base's, or of the adapter's; they may be empty.
        end_ids: what ends an answer; the last of them is end-of-text, which also pads.
        model_type: of the model; ``qwen`` has keys of its own for ``chat()``, which others lose.
    """
    known = config.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    others = [id_ for id_ in known if id_ not in end_ids]
    ends = [*end_ids[:-1], *others, end_ids[-1]]
    changed = {**config, "eos_token_id": ends, "pad_token_id": end_ids[-1]}
    chat_keys = {"chat_format": "chatml", "max_window_size": config.get("max_window_size", MAX_WINDOW_SIZE)}
    if model_type == "qwen":
        return changed | chat_keys
    return {key: value for key, value in changed.items() if key not in chat_keys}
