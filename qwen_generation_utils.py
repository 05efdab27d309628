"""The original's name of the module with ``make_context`` and ``decode_tokens``, for scripts that import it."""

from qwen_model.generation import StopWordsLogitsProcessor, decode_tokens, get_stop_words_ids, make_context

__all__ = ["StopWordsLogitsProcessor", "decode_tokens", "get_stop_words_ids", "make_context"]
