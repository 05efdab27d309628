"""A model's tensors and config in another layout."""

from __future__ import annotations

from typing import Any

from checkpoints.source import TensorSource
from export.layouts.config import config_to_qwen, config_to_qwen2
from export.layouts.qwen2_names import layout_of_config
from export.layouts.tensors import tensors_to_qwen, tensors_to_qwen2


def convert_model(
    source: TensorSource, config: dict[str, Any], layout: str, dynamic_ntk: bool = False
) -> tuple[TensorSource, dict[str, Any]]:
    """Convert tensors and config.json to ``layout``; return them unchanged if they have it already.

    Args:
        dynamic_ntk: see :func:`export.layouts.config.config_to_qwen2`.

    Raises:
        ConfigError: a model that ``layout`` cannot express.
    """
    if layout_of_config(config) == layout:
        return source, config
    # The config first: what a layout cannot express is said in the config's words.
    converted = config_to_qwen2(config, dynamic_ntk) if layout == "qwen2" else config_to_qwen(config)
    return convert_tensors(source, config, layout), converted


def convert_tensors(source: TensorSource, config: dict[str, Any], layout: str) -> TensorSource:
    """Convert the tensors alone, without warnings about what the config of ``layout`` cannot express.

    Args:
        config: config.json of ``source``.
    """
    if layout_of_config(config) == layout:
        return source
    return tensors_to_qwen2(source, config) if layout == "qwen2" else tensors_to_qwen(source, config)
