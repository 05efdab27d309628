"""Make transformers' Auto classes open Qwen v1 folders with the classes of this package."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from qwen_model.configuration_qwen import QWenConfig
from qwen_model.modeling_qwen import QWenLMHeadModel, QWenModel
from qwen_model.tokenization_qwen import QWenTokenizer


def register_qwen() -> None:
    """Register ``model_type`` "qwen"; calling it again changes nothing.

    After it ``from_pretrained(folder)`` needs no ``trust_remote_code``; code that lies in the folder is never run.
    """
    AutoConfig.register("qwen", QWenConfig, exist_ok=True)
    AutoTokenizer.register(QWenConfig, slow_tokenizer_class=QWenTokenizer, exist_ok=True)
    AutoModel.register(QWenConfig, QWenModel, exist_ok=True)
    AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)
