"""LoRA adapters: which layers get one, and whether embeddings train beside it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from errors import ConfigError
from qwen_model.chatml import control_ids_of
from training.args import LoraArguments
from training.loading import Checkpoint

logger = logging.getLogger(__name__)

_LATER_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGET_MODULES = {"qwen": ["c_attn", "c_proj", "w1", "w2"], "qwen2": _LATER_LAYERS, "qwen3": _LATER_LAYERS}
EMBEDDING_MODULES = {
    "qwen": ["wte", "lm_head"],
    "qwen2": ["embed_tokens", "lm_head"],
    "qwen3": ["embed_tokens", "lm_head"],
}


@dataclass(frozen=True)
class EmbeddingsPolicy:
    """What trains of embedding and head (``full``, ``chatml_tokens``, ``none``), and why."""

    mode: str
    reason: str


def embeddings_policy(requested: str, checkpoint: Checkpoint) -> EmbeddingsPolicy:
    """Resolve ``--trainable_embeddings``.

    A base model of Qwen v1 never saw ``<|im_start|>`` and ``<|im_end|>``: without training their rows it cannot learn
    where an answer ends. Whether a checkpoint is one is what its generation_config says, not what its folder is called.
    """
    if requested != "auto":
        return EmbeddingsPolicy(requested, f"--trainable_embeddings {requested}")
    if checkpoint.model_type != "qwen":
        return EmbeddingsPolicy("none", f"auto: {checkpoint.model_type} checkpoints know the ChatML tokens")
    if checkpoint.chat_format == "chatml":
        return EmbeddingsPolicy("none", "auto: generation_config.json says chat_format chatml, a chat model")
    return EmbeddingsPolicy(
        "full",
        f"auto: generation_config.json says chat_format {checkpoint.chat_format!r}, a base model that does not know "
        "the ChatML tokens yet",
    )


def attach_lora(
    model: PreTrainedModel, checkpoint: Checkpoint, lora: LoraArguments, policy: EmbeddingsPolicy
) -> PeftModel:
    """Freeze the model and put an adapter on it.

    Raises:
        ConfigError: target modules that the model does not have, or an adapter that cannot be continued.
    """
    if lora.lora_weight_path:
        try:
            return PeftModel.from_pretrained(model, lora.lora_weight_path, is_trainable=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"--lora_weight_path {lora.lora_weight_path}: {' '.join(str(error).split())[:300]}",
                "Give the folder of a LoRA adapter of this model",
            ) from error
    targets = lora.lora_target_modules or TARGET_MODULES[checkpoint.model_type]
    _check_targets(model, targets)
    tied = bool(model.config.tie_word_embeddings)
    embeddings: dict[str, Any] = {}
    if policy.mode == "full":
        # Tied embedding and head stay one tensor only if peft is told.
        embeddings = {"modules_to_save": EMBEDDING_MODULES[checkpoint.model_type], "ensure_weight_tying": tied}
    elif policy.mode == "chatml_tokens":
        ids = sorted(control_ids_of(checkpoint.tokenizer).values())
        names = EMBEDDING_MODULES[checkpoint.model_type][: 1 if tied else 2]
        embeddings = {"trainable_token_indices": {name: ids for name in names}}
    config = LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        bias=lora.lora_bias,
        task_type="CAUSAL_LM",
        base_model_name_or_path=checkpoint.name,
        **embeddings,
    )
    return get_peft_model(model, config)


def hold_trained_weights_in_float32(model: torch.nn.Module) -> None:
    """Updates of a few thousandths of a weight vanish in bfloat16's eight bits."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    layers = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    missing = [target for target in targets if target.rsplit(".", 1)[-1] not in layers]
    if missing:
        raise ConfigError(
            f"--lora_target_modules {' '.join(missing)}: the model has no such layers",
            f"It has {' '.join(sorted(layers))}",
        )
