"""The tokens that end an answer, and the ``generation_config.json`` that lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chat.chatml import END_OF_TEXT, IM_END, MAX_WINDOW_SIZE


def end_ids_of(tokenizer: Any, stops: Sequence[str] = ()) -> list[int]:
    """Return the ids that end an answer: ``<|im_end|>``, then end-of-text; an empty list if either is missing.

    Args:
        stops: ``Family.stops``, which come first.
    """
    tokens = [*dict.fromkeys(token for token in (*stops, IM_END) if token != END_OF_TEXT), END_OF_TEXT]
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    # For a missing token some tokenizers return the id of the unknown token.
    return ids if None not in ids and tokenizer.convert_ids_to_tokens(ids) == tokens else []


def stopping_generation_config(config: Mapping[str, Any], end_ids: Sequence[int], model_type: str) -> dict[str, Any]:
    """Return the values of ``generation_config.json`` for a model that was tuned on ChatML.

    Args:
        config: the values of the base model or of the adapter; may be empty.
        end_ids: ids that end an answer; the last one is end-of-text, which pads if the model has no other padding.
        model_type: of the model. ``qwen`` has extra keys for ``chat()``, which are removed for other models.
    """
    eos = config.get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    other_ids = [id_ for id_ in eos_ids if id_ not in end_ids]
    all_ids = [*end_ids[:-1], *other_ids, end_ids[-1]]
    pad = config.get("pad_token_id")
    changed = {**config, "eos_token_id": all_ids, "pad_token_id": end_ids[-1] if pad is None else pad}
    # With this key transformers may take these values from config.json instead.
    changed.pop("_from_model_config", None)
    chat_keys = {"chat_format": "chatml", "max_window_size": config.get("max_window_size", MAX_WINDOW_SIZE)}
    if model_type == "qwen":
        return changed | chat_keys
    return {key: value for key, value in changed.items() if key not in chat_keys}
