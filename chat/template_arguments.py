"""Arguments of chat templates: which template reads one, and which of them a template has refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def template_text(tokenizer: Any) -> str:
    """Return the chat template for conversations without tools; empty if a tokenizer has none."""
    template = getattr(tokenizer, "chat_template", None)
    return str((template.get("default") if isinstance(template, dict) else template) or "")


def reads_argument(template: str, name: str) -> bool:
    """Return whether a template has a name as a whole word; an argument that it does not have changes no text."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", template) is not None


def refused_argument(arguments: Mapping[str, Any]) -> str:
    """Return the name of the argument for which a template has failed: a text, of which templates know some.

    Truth values fail in none of the official ones; without a text the last one is named.
    """
    texts = [name for name, value in arguments.items() if isinstance(value, str)]
    return (texts or list(arguments))[-1]
