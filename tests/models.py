"""Writers of tiny checkpoints of every family and of small data files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AddedToken,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.golden import SMALL
from tests.vocabulary import base_tokenizer

TINY = SMALL / "tiny-qwen-small"

# Different lengths and numbers of answers, two languages: rows of a batch differ in padding and targets.
CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("user", "Hi"), ("assistant", "Hello!")],
    [("user", "你好，你是谁？"), ("assistant", "我是一个小模型，很高兴认识你。")],
    [("system", "Be short."), ("user", "What is water?"), ("assistant", "A liquid of hydrogen and oxygen.")],
    [("user", "Count."), ("assistant", "One."), ("user", "Go on."), ("assistant", "Two, three, four, five.")],
    [("user", "Which day follows Monday in the week, please?"), ("assistant", "Tuesday")],
    [("user", "天"), ("assistant", "地"), ("user", "日"), ("assistant", "月"), ("user", "山"), ("assistant", "水")],
    [("assistant", "Good morning."), ("user", "Morning!"), ("assistant", "What shall we read today?")],
    [("user", "Name three colours of the rainbow."), ("assistant", "Red, green and violet.\n\nThere are more.")],
]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Not special: decoding with skip_special_tokens keeps them.
PLAIN_TOKENS = {"qwen2": ("<tool_call>", "</tool_call>")}
PLAIN_TOKENS["qwen3"] = (*PLAIN_TOKENS["qwen2"], "<tool_response>", "</tool_response>", "<think>", "</think>")
PLAIN_TOKENS["qwen3_5_text"] = PLAIN_TOKENS["qwen3"]

DELTA_NETS: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 4, "partial_rotary_factor": 0.5,
}  # fmt: skip
"""Sizes of a tiny Qwen3.5 beside those of every family."""


def write_conversations(path: Path, conversations: Sequence[Sequence[tuple[str, str]]] = CONVERSATIONS) -> Path:
    """Write a data file of conversations, each a list of (from, value)."""
    records = [{"conversations": [{"from": f, "value": v} for f, v in turns]} for turns in conversations]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def change_json(path: Path, **values: Any) -> None:
    """Set values of a JSON object; ``None`` removes the key."""
    changed = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def copy_checkpoint(folder: Path, source: Path = TINY, chat_format: str = "chatml", **config: Any) -> Path:
    """Copy a Qwen v1 chat checkpoint, by default as a chat model, with ``chat_format`` raw as a base model."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copyfile(file, folder / file.name)
    change_json(folder / "generation_config.json", chat_format=chat_format)
    change_json(folder / "config.json", **config)
    return folder


def copy_tied(folder: Path, chat_format: str = "chatml") -> Path:
    """Copy the tiny Qwen v1 checkpoint with tied embedding and head."""
    copy_checkpoint(folder, chat_format=chat_format, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def copy_in_bfloat16(folder: Path, chat_format: str = "chatml") -> Path:
    """Copy the tiny Qwen v1 checkpoint in bfloat16."""
    copy_checkpoint(folder, chat_format=chat_format, bf16=True, fp32=False, torch_dtype="bfloat16")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_later_checkpoint(
    folder: Path,
    model_type: str,
    template: str | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    hidden_size: int = 32,
    positions: int = 512,
) -> Path:
    """Write a tiny random checkpoint after Qwen v1, with a fast tokenizer of 700 ranks and a chat template."""
    base = base_tokenizer(TINY / "qwen.tiktoken")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base)
    for special, tokens in ((True, SPECIAL_TOKENS), (False, PLAIN_TOKENS[model_type])):
        tokenizer.add_tokens(
            [AddedToken(token, special=special, normalized=False) for token in tokens], special_tokens=special
        )
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", "<|im_end|>", template
    tokenizer.save_pretrained(folder)
    change_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")  # as in the published ones
    sizes: dict[str, Any] = {
        "vocab_size": 768, "hidden_size": hidden_size, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": positions,
        "initializer_range": 0.1, "tie_word_embeddings": tied,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    model: Any
    if model_type == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    elif model_type == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8))
    else:
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes, **DELTA_NETS, head_dim=8))
    model.to(dtype).save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    generation = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1], do_sample=True, top_p=0.8, top_k=20)
    generation.save_pretrained(folder)
    return folder
