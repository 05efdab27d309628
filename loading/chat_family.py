"""A checkpoint's chat format, by its ``model_type`` and chat template; names of folders do not count."""

from __future__ import annotations

from typing import Any

from chat.detect import family_of
from chat.families import QWEN_V1, Family
from chat.template import CHATML_TEMPLATE
from checkpoints.base_files import TOKENIZER_CONFIG, Files, values_of
from errors import ConfigError
from qwen_model.architectures import architecture_of


def chat_family(model_type: str, tokenizer: Any, place: str | None = None, **template_kwargs: Any) -> Family:
    """Qwen v1's fixed format, or that of the tokenizer's chat template with arguments of it.

    Args:
        place: see ``family_of``.

    Raises:
        ConfigError: an unsupported ``model_type``, or a chat template that cannot be used.
    """
    architecture = architecture_of(model_type)
    templates = getattr(tokenizer, "chat_template", None)
    if isinstance(templates, dict) and "default" not in templates:
        what = f"the checkpoint has the chat templates {', '.join(sorted(templates))}, and none named default"
        raise ConfigError(what, "Add chat_template.jinja, the one for conversations without tools")
    if not architecture.brings_chat_template:
        return QWEN_V1
    return family_of(tokenizer, architecture.base_system, place, **template_kwargs)


def add_chat_template(files: Files, model_type: str) -> None:
    """Add Qwen v1's template to the files of a Qwen v1 or Qwen2 that has none, and is prompted that way."""
    has_one = values_of(files, TOKENIZER_CONFIG).get("chat_template") or any("chat_template" in name for name in files)
    if not has_one and architecture_of(model_type).base_system is not None:
        files["chat_template.jinja"] = CHATML_TEMPLATE.encode()
