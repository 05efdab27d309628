"""Which checkpoints are written as GGUF files; needs no torch."""

from __future__ import annotations

from pathlib import Path

from checkpoints.model_config import find_quantization
from checkpoints.whole import load_text_config
from errors import ConfigError
from qwen_model.architectures import TEXT_TYPES, architecture_of


def load_model_type(folder: Path) -> str:
    """Return the ``model_type`` of a checkpoint to export.

    Raises:
        ConfigError: it is quantised, of an unknown architecture, or of one that is not converted.
    """
    file = folder / "config.json"
    model_type = architecture_of(load_text_config(folder).get("model_type"), file).model_type
    if model_type in TEXT_TYPES.values():
        what = f"{file}: model_type {model_type} is not converted: its GGUF files were not compared with the model here"
        raise ConfigError(what, "Use llama.cpp's convert_hf_to_gguf.py of a version that knows it")
    if quantization := find_quantization(folder):
        fix = "Give the model that it was made of; --quantize quantises that for llama.cpp"
        raise ConfigError(f"{folder} is quantised ({quantization}) already", fix)
    return model_type
