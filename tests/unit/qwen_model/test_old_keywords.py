"""Keywords that the original's snippets pass to ``from_pretrained``: meant, or refused with what to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from errors import ConfigError
from qwen_model.kv_cache import Int8Layer
from qwen_model.modeling_qwen import QWenLMHeadModel
from qwen_model.register import register_qwen
from tests.golden import SMALL
from tests.models import change_json, copy_in_bfloat16

register_qwen()

TINY = SMALL / "tiny-qwen-small"
OPENERS = {"auto": AutoModelForCausalLM.from_pretrained, "class": QWenLMHeadModel.from_pretrained}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, whose config has every key of the published ones."""
    folder = copy_in_bfloat16(tmp_path_factory.mktemp("published") / "model")
    caches = {"use_cache_quantization": False, "use_cache_kernel": False, "softmax_in_fp32": False}
    change_json(folder / "config.json", **caches)
    return folder


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize(
    ("keywords", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"fp32": True}, torch.float32),
        ({"fp16": True, "bf16": False}, torch.float16),
        ({"bf16": True, "torch_dtype": "auto"}, torch.bfloat16),
        ({"fp32": True, "torch_dtype": torch.float32}, torch.float32),
        ({"fp32": True, "dtype": "float32"}, torch.float32),
        ({"fp16": False, "bf16": False, "fp32": False}, torch.bfloat16),
    ],
    ids=str,
)
def test_precision_flag_is_the_dtype(
    published: Path, opener: str, keywords: dict[str, Any], dtype: torch.dtype
) -> None:
    model = OPENERS[opener](published, **keywords)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_flags_of_the_config_follow_the_dtype(published: Path) -> None:
    config = AutoConfig.from_pretrained(published, fp32=True)
    assert (config.dtype, config.bf16, config.fp16, config.fp32) == (torch.float32, False, False, True)
    assert AutoModelForCausalLM.from_pretrained(published, config=config).dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(published, config=config, fp16=True).dtype == torch.float16


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize(
    "keywords",
    [
        {"use_flash_attn": False}, {"use_flash_attn": "auto"}, {"use_cache_quantization": False},
        {"use_cache_kernel": True},
        {"resume_download": True}, {"resume_download": False}, {"softmax_in_fp32": True}, {"low_cpu_mem_usage": True},
    ],
    ids=str,
)  # fmt: skip
def test_keyword_that_asks_for_nothing_is_accepted(published: Path, opener: str, keywords: dict[str, Any]) -> None:
    model = OPENERS[opener](published, **keywords)
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("opener", OPENERS)
def test_evaluation_settings_are_meant(published: Path, opener: str) -> None:
    model = OPENERS[opener](published, use_dynamic_ntk=False, use_logn_attn=False)
    assert not model.config.use_dynamic_ntk and not model.config.use_logn_attn
    with pytest.raises(ConfigError, match="use_dynamic_ntk 'x' is not a bool"):
        OPENERS[opener](published, use_dynamic_ntk="x")
    with pytest.raises(ConfigError, match="num_hidden_layers 10000000 is not a whole number"):
        OPENERS[opener](published, num_hidden_layers=10_000_000)


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"bf16": True, "fp16": True}, r"bf16=True, fp16=True.*Write dtype=torch\.bfloat16"),
        ({"bf16": True, "torch_dtype": torch.float16}, r"contradicts dtype=torch\.float16"),
        ({"bf16": "yes"}, r"bf16='yes'.*True or False"),
        ({"use_cache_quantization": "yes"}, r"use_cache_quantization='yes'.*True or False"),
        ({"use_flash_attn": True, "attn_implementation": "eager"}, "contradicts attn_implementation='eager'"),
        ({"use_flash_attn": "yes"}, r"use_flash_attn='yes'.*Write attn_implementation"),
        ({"softmax_in_fp32": "yes"}, "softmax_in_fp32='yes'"),
    ],
    ids=str,
)
def test_what_does_not_exist_here_is_refused(
    published: Path, opener: str, keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        OPENERS[opener](published, **keywords)


@pytest.mark.parametrize("has_it", [True, False])
def test_flash_attention_is_the_attention_of_that_name(
    published: Path, monkeypatch: pytest.MonkeyPatch, has_it: bool
) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: has_it)
    if has_it:
        with pytest.raises(ImportError, match="FlashAttention2"):  # transformers looks for the package
            QWenLMHeadModel.from_pretrained(published, use_flash_attn=True)
    else:
        with pytest.raises(ConfigError, match=r"use_flash_attn=True.*flash-attn"):
            QWenLMHeadModel.from_pretrained(published, use_flash_attn=True)


@pytest.mark.parametrize("opener", OPENERS)
def test_quantised_cache_of_the_original(
    published: Path, opener: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``generate`` and ``forward`` build it; it turns flash attention off; a folder keeps the setting."""
    keywords = {"use_cache_quantization": True, "use_cache_kernel": True, "use_flash_attn": True}
    model = OPENERS[opener](published, **keywords)
    assert "turns use_flash_attn=True off" in caplog.text and model.config._attn_implementation == "sdpa"
    ids = torch.arange(9)[None]
    settings: dict[str, Any] = {"max_new_tokens": 2, "return_dict_in_generate": True}
    for cache in (model(ids).past_key_values, model.generate(ids, **settings).past_key_values):
        assert {type(layer) for layer in cache.layers} == {Int8Layer}
    assert model.generate(ids, use_cache=False, **settings).past_key_values is None
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.config.use_cache_quantization and saved.config.cache_kind == "int8"
    assert OPENERS[opener](tmp_path, use_cache_quantization=False).config.cache_kind is None


def test_tokenizer_keeps_no_keyword_of_downloads(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY, resume_download=True)
    tokenizer.save_pretrained(tmp_path)
    assert "resume_download" not in (tmp_path / "tokenizer_config.json").read_text()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10_000_000), ("num_hidden_layers", 0), ("hidden_size", 2**40), ("vocab_size", -1),
        ("num_attention_heads", 0), ("intermediate_size", 10**12), ("seq_length", 0), ("attn_dropout_prob", 7.0),
        ("layer_norm_epsilon", float("nan")), ("rotary_emb_base", -1), ("rotary_pct", 1.5), ("hidden_size", "64"),
        ("num_hidden_layers", 2.5), ("vocab_size", None), ("kv_channels", [16]), ("layer_norm_epsilon", "x"),
        ("no_bias", "false"), ("bf16", 1),
    ],
)  # fmt: skip
def test_absurd_value_is_refused_before_the_model_is_built(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {name} .* is not a"):
        AutoConfig.for_model("qwen", **{name: value})
