"""The chat format of checkpoints that bring no template."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from chat.families import QWEN_V1
from errors import ConfigError
from loading.chat_family import chat_family


@pytest.mark.parametrize(
    ("model_type", "default_system"),
    [("qwen2", "You are a helpful assistant."), ("qwen3", None), ("qwen3_5_text", None)],
    ids=["qwen2", "qwen3", "qwen3_5"],
)
def test_base_checkpoint_without_a_template(model_type: str, default_system: str | None) -> None:
    family = chat_family(model_type, SimpleNamespace(chat_template=None))
    assert (family.name, family.default_system) == ("chatml", default_system)


def test_model_type_decides() -> None:
    assert chat_family("qwen", None) is QWEN_V1
    with pytest.raises(ConfigError, match=r"model_type 'llama' is not supported"):
        chat_family("llama", None)
