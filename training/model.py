"""The model of a run: its checkpoint in the precision that the flags select, and its adapter if it trains one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from loading.adapter_check import check_adapter, warn_of_other_form
from loading.adapters import EmbeddingsPolicy, LoraSettings, attach_lora, continue_lora, embeddings_policy
from loading.checkpoint import Checkpoint, load_model
from qwen_model.fast_blocks import use_fast_blocks
from qwen_model.sample_attention import take_rows
from training.config.args import LoraArguments, RunArguments
from training.rope_checks import check_continued_scaling
from training.rows import COMPILE_FLAGS, why_padded


def choose_embeddings(lora: LoraArguments, checkpoint: Checkpoint) -> EmbeddingsPolicy | None:
    """Return what ``--trainable_embeddings`` means for a checkpoint; ``None`` without ``--use_lora``.

    Raises:
        ConfigError: the adapter of ``--lora_weight_path`` cannot be used with the checkpoint.
    """
    if not lora.use_lora:
        return None
    if lora.lora_weight_path:
        check_adapter(checkpoint, lora.lora_weight_path, "--lora_weight_path", lora.any_base)
        quantization = checkpoint.quantization or lora.quantization
        check_continued_scaling(lora.lora_weight_path, checkpoint.yarn)
        warn_of_other_form(lora.lora_weight_path, "--lora_weight_path", quantization)
    return embeddings_policy(lora.trainable_embeddings, checkpoint, lora.lora_weight_path)


def load_training_model(
    checkpoint: Checkpoint,
    args: RunArguments,
    training_arguments: TrainingArguments,
    policy: EmbeddingsPolicy | None = None,
) -> Any:
    """Load the weights, quantise them if ``--q_lora`` asks for it, and attach the adapter.

    Args:
        policy: which embedding rows train beside the adapter; only with ``--use_lora``, else ``None``.

    Raises:
        ConfigError: weights or adapter that cannot be loaded.
    """
    quantize = None if checkpoint.quantization else args.lora.quantization
    dtype = weights_dtype(training_arguments, args.lora.use_lora, args.options.pure_bf16)
    model = load_model(checkpoint, dtype, args.model.attn_implementation, quantize)
    # For the initial values of the adapter. Under ZeRO-3 loading draws numbers: modules have values at first.
    set_seed(training_arguments.seed)
    return complete_model(model, checkpoint, args, policy)


def complete_model(
    model: Any, checkpoint: Checkpoint, args: RunArguments, policy: EmbeddingsPolicy | None = None
) -> Any:
    """Let a loaded model take the batches of the run, and attach the adapter. A rehearsal calls it on the meta device.

    Args:
        policy: see ``load_training_model``.

    Raises:
        ConfigError: the adapter cannot be attached.
    """
    if not why_padded(args, checkpoint.config.to_dict()):
        take_rows(model)
    # The compiler fuses the operations of the classes itself; ZeRO-3 gathers parameters when modules are called.
    if not (any(map(args.trainer_value, COMPILE_FLAGS)) or is_deepspeed_zero3_enabled()):
        use_fast_blocks(model)
    # The Trainer would set these itself, with a warning.
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id = checkpoint.tokenizer.pad_token_id, checkpoint.tokenizer.eos_token_id
    if policy is None:
        return model
    in_float32 = not args.options.pure_bf16
    if args.lora.lora_weight_path:
        return continue_lora(model, args.lora.lora_weight_path, in_float32)
    return attach_lora(model, checkpoint, lora_settings(args.lora), policy, in_float32)


def weights_dtype(training_arguments: TrainingArguments, use_lora: bool, pure_bf16: bool) -> torch.dtype:
    """The precision of the weights in memory.

    Trained weights are float32, under autocast with ``--bf16`` or ``--fp16``; weights that LoRA freezes take the
    autocast dtype. ``--pure_bf16`` keeps everything in bfloat16.
    """
    if pure_bf16 or (use_lora and training_arguments.bf16):
        return torch.bfloat16
    if use_lora and training_arguments.fp16:
        return torch.float16
    return torch.float32


def lora_settings(lora: LoraArguments) -> LoraSettings:
    """The ``--lora_*`` flags as ``loading.adapters`` takes them."""
    return LoraSettings(
        rank=lora.lora_r,
        alpha=lora.lora_alpha,
        dropout=lora.lora_dropout,
        target_modules=lora.lora_target_modules,
        bias=lora.lora_bias,
        rslora=lora.use_rslora,
        dora=lora.use_dora,
        init=lora.init_lora_weights.lower(),
        rank_pattern=lora.lora_rank_pattern or {},
        alpha_pattern=lora.lora_alpha_pattern or {},
    )
