"""Qwen v1's config.json to Qwen2's and back."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from checkpoints.files import load_json
from errors import ConfigError
from export.layouts.config import config_to_qwen, config_to_qwen2
from qwen_model.configuration_qwen import QWenConfig
from tests.golden import Golden
from tests.models import TINY

CONFIG = load_json(TINY / "config.json")


def test_config_round_trip(any_golden: Golden) -> None:
    config = any_golden.config
    before, after = (QWenConfig(**each) for each in (config, config_to_qwen(config_to_qwen2(config))))
    ignored = {"auto_map", "transformers_version", "onnx_safe"}
    for key in before.to_dict().keys() - ignored:
        assert getattr(after, key) == getattr(before, key), key


def test_config_of_qwen_14b_chat() -> None:
    """Qwen-14B-Chat's values and their equivalents in Qwen2."""
    config = {
        "model_type": "qwen", "hidden_size": 5120, "intermediate_size": 27392, "kv_channels": 128,
        "num_attention_heads": 40, "num_hidden_layers": 40, "vocab_size": 152064, "seq_length": 2048,
        "max_position_embeddings": 8192, "rotary_emb_base": 10000, "layer_norm_epsilon": 1e-6, "bf16": True,
        "use_dynamic_ntk": True, "use_logn_attn": True, "no_bias": True, "rotary_pct": 1.0,
    }  # fmt: skip
    later = Qwen2Config(**config_to_qwen2(config))
    assert (later.intermediate_size, later.num_key_value_heads, later.max_position_embeddings) == (13696, 40, 2048)
    assert (later.rms_norm_eps, later.dtype, later.tie_word_embeddings) == (1e-6, torch.bfloat16, False)
    assert later.rope_parameters == {"rope_theta": 10000, "rope_type": "default"}
    back = config_to_qwen(config_to_qwen2(config))
    assert {key: back[key] for key in config} == config


def test_lost_extrapolation_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config_to_qwen2(CONFIG | {"use_dynamic_ntk": False, "use_logn_attn": False})
        assert not caplog.messages
        config_to_qwen2(CONFIG)
    assert "no dynamic NTK and no log-n attention" in caplog.text and "64 tokens" in caplog.text
    assert '"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}' in caplog.text
    caplog.clear()
    config_to_qwen2(CONFIG, dynamic_ntk=True)
    assert "no log-n attention" in caplog.text and "no dynamic NTK" not in caplog.text


def test_model_without_extrapolation_keeps_max_position_embeddings() -> None:
    config = CONFIG | {"use_dynamic_ntk": False, "use_logn_attn": False}
    assert config_to_qwen2(config)["max_position_embeddings"] == CONFIG["max_position_embeddings"]


def test_quantization_config_names_modules_of_the_layout() -> None:
    settings = {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "model_file_base_name": "gptq_model",
        "modules_in_block_to_quantize": [["attn.c_attn"], ["attn.c_proj"], ["mlp.w1", "mlp.w2"]],
        "modules_to_not_convert": ["lm_head", "transformer.h.0.mlp.c_proj"],
    }  # fmt: skip
    there = config_to_qwen2(CONFIG | {"quantization_config": settings})["quantization_config"]
    q, k, v = (f"self_attn.{letter}_proj" for letter in "qkv")
    assert there["modules_in_block_to_quantize"] == [[q, k, v], ["self_attn.o_proj"], ["mlp.up_proj", "mlp.gate_proj"]]
    assert there["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    assert "model_file_base_name" not in there
    back = config_to_qwen(config_to_qwen2(CONFIG) | {"quantization_config": there})["quantization_config"]
    assert back == {key: value for key, value in settings.items() if key != "model_file_base_name"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_bias": False}, "no_bias false"),
        ({"rotary_pct": 0.5}, "rotary_pct 0.5"),
        ({"scale_attn_weights": False}, "scale_attn_weights false"),
        ({"intermediate_size": 129}, "intermediate_size 129 is odd"),
        ({"kv_channels": 16}, "kv_channels 16 x num_attention_heads 4 is not hidden_size 32"),
        ({"seq_length": None}, "seq_length is missing"),
        ({"num_hidden_layers": "two"}, "config.json: num_hidden_layers 'two' is not a whole number"),
        ({"quantization_config": {"bits": 4, "dynamic": {"-:x": {}}}}, "its own rules for some modules"),
    ],
)
def test_config_that_qwen2_cannot_express_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_to_qwen2(CONFIG | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads 2 is not num_attention_heads 4"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "a sliding window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary embeddings with .*yarn"),
        ({"head_dim": 16}, "head_dim 16 x 4 heads is not hidden_size 32"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": "many"}, "config.json is not valid"),
        ({"model_type": "qwen3"}, "model_type 'qwen3' is not qwen2"),
    ],
)
def test_config_that_qwen_cannot_express_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_to_qwen(config_to_qwen2(CONFIG) | changes)
