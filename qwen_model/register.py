"""Registration of Qwen v1 with transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from qwen_model.configuration_qwen import QWenConfig
from qwen_model.modeling_qwen import QWenLMHeadModel, QWenModel
from qwen_model.tokenization_qwen import QWenTokenizer


def register_qwen() -> None:
    """Register the classes of this package for ``model_type`` "qwen"; repeated calls have no effect.

    ``from_pretrained(folder)`` then needs no ``trust_remote_code``, and code in the folder is never run.
    """
    AutoConfig.register("qwen", QWenConfig, exist_ok=True)
    AutoTokenizer.register(QWenConfig, slow_tokenizer_class=QWenTokenizer, exist_ok=True)
    AutoModel.register(QWenConfig, QWenModel, exist_ok=True)
    AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)
