"""Writer of tiny folders of Qwen3.5 as it is published: a text model within a larger one, with other parts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from chat.template import CHATML_TEMPLATE
from tests.models import write_later_checkpoint

TEXT_SIZES: dict[str, Any] = {
    "vocab_size": 768, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "max_position_embeddings": 1024, "initializer_range": 0.1,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5, "mrope_interleaved": True,
        "mrope_section": [1, 1, 0],
    },
}  # fmt: skip
VISION_SIZES = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
    "num_position_embeddings": 16,
}  # fmt: skip
IMAGE_TOKENS = {
    "image_token_id": 760, "video_token_id": 761, "vision_start_token_id": 762, "vision_end_token_id": 763,
}  # fmt: skip
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")


def write_whole_folder(
    folder: Path, template: str | None = CHATML_TEMPLATE, tied: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a random model of transformers' class for texts and images, with layers that draft and a tokenizer."""
    write_later_checkpoint(folder, "qwen3", template, tied)
    (folder / "model.safetensors").unlink()
    sizes = {**TEXT_SIZES, "tie_word_embeddings": tied}
    config = Qwen3_5Config(text_config=sizes, vision_config=VISION_SIZES, tie_word_embeddings=tied, **IMAGE_TOKENS)
    torch.manual_seed(0)
    model: Any = Qwen3_5ForConditionalGeneration(config)
    model.to(dtype).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"):
        tensors[name] = torch.randn(32, 32).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in PROCESSOR_FILES:
        (folder / name).write_text('{"patch_size": 16}\n')
    return folder


def copy_whole_folder(source: Path, folder: Path) -> Path:
    """Copy a folder of :func:`write_whole_folder`."""
    shutil.copytree(source, folder)
    return folder
