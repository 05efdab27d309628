"""Registration of Qwen v1 with transformers' Auto classes."""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from qwen_model.configuration_qwen import QWenConfig
from qwen_model.modeling_qwen import QWenLMHeadModel, QWenModel
from qwen_model.tokenization_qwen import QWenTokenizer

# Arguments that only AutoTokenizer has.
_AUTO_ARGUMENTS = ("config", "use_fast", "tokenizer_type", "code_revision", "mistral_format")


def register_qwen() -> None:
    """Register the classes of this package for ``model_type`` "qwen"; repeated calls have no effect.

    ``from_pretrained(folder)`` then needs no ``trust_remote_code``, and code in the folder is never run, even with it.
    """
    AutoConfig.register("qwen", QWenConfig, exist_ok=True)
    AutoTokenizer.register(QWenConfig, slow_tokenizer_class=QWenTokenizer, exist_ok=True)
    AutoModel.register(QWenConfig, QWenModel, exist_ok=True)
    AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)
    _put_our_tokenizer_first()


def _put_our_tokenizer_first() -> None:
    """Make ``AutoTokenizer`` use ours for Qwen v1: unlike the other Auto classes it prefers the code of a folder."""
    original = AutoTokenizer.from_pretrained
    if getattr(original, "knows_qwen", False):
        return

    @wraps(original)
    def from_pretrained(name_or_path: Any, *inputs: Any, **kwargs: Any) -> Any:
        if not _is_qwen(name_or_path, **kwargs):
            return original(name_or_path, *inputs, **kwargs)
        own = {key: value for key, value in kwargs.items() if key not in _AUTO_ARGUMENTS}
        return QWenTokenizer.from_pretrained(name_or_path, *inputs, **own)

    setattr(from_pretrained, "knows_qwen", True)  # noqa: B010 - an attribute of a function
    setattr(AutoTokenizer, "from_pretrained", staticmethod(from_pretrained))  # noqa: B010 - it is a class method


def _is_qwen(
    name_or_path: Any, config: Any = None, gguf_file: str | None = None, trust_remote_code: Any = None, **kwargs: Any
) -> bool:
    """Return whether a folder or hub id is of ``model_type`` "qwen", by the config that is given or that it has.

    Args:
        trust_remote_code: not needed to read a config.
        kwargs: other arguments of ``from_pretrained``; those for the hub are used.
    """
    if config is not None:
        return getattr(config, "model_type", None) == "qwen"
    if gguf_file:
        return False
    try:
        values, _ = PreTrainedConfig.get_config_dict(name_or_path, **kwargs)
    except (OSError, ValueError):
        return False  # AutoTokenizer reports it
    return values.get("model_type") == "qwen"
