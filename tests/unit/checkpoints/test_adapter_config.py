"""Options of adapters: known ones are checked, those without effect pass, those that name code are refused."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.adapter import read_adapter
from checkpoints.adapter_config import load_adapter_config
from checkpoints.patterns import time_limit
from errors import ConfigError
from loading.adapters import continue_lora, embeddings_policy, load_adapter
from loading.checkpoint import load_checkpoint, load_model
from loading.inference import load_for_inference
from tests.golden import SMALL
from tests.models import TINY, change_json, write_conversations
from training.checks import check_args
from training.config.parsing import parse_args

CHECKPOINT = load_checkpoint(str(TINY))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    shutil.copytree(SMALL / "training" / "lora_chat_adapter", folder)
    return folder


def _check_flags(adapter: Path) -> None:
    data = write_conversations(adapter.parent / "data.json")
    flags = ["--model_name_or_path", TINY, "--data_path", data, "--output_dir", adapter.parent / "out", "--use_lora"]
    check_args(parse_args([str(flag) for flag in (*flags, "--lora_weight_path", adapter)]))


OPENERS: dict[str, Callable[[Path], Any]] = {
    "merge": read_adapter,
    "ask": lambda folder: load_for_inference(CHECKPOINT, str(folder)),
    "continue": lambda folder: continue_lora(load_model(CHECKPOINT, torch.float32), str(folder)),
    "policy": lambda folder: embeddings_policy("auto", CHECKPOINT, str(folder)),
    "flags": _check_flags,
}
"""Everything that opens an adapter."""


def set_options(adapter: Path, **options: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


CODE: list[dict[str, Any]] = [
    {"megatron_config": {"a": 1}, "megatron_core": "evil_payload"},
    {"megatron_core": "evil_payload"},
    {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_payload"}},
    {"runtime_config": {}, "custom_modules": {"a": "evil_payload.B"}},
    {"peft_type": "evil_payload"},
    {"corda_config": 1, "init_lora_weights": "corda"},
]


@pytest.mark.parametrize("options", CODE, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("opener", [*OPENERS])
def test_option_that_names_code(
    adapter: Path, opener: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (adapter.parent / "evil_payload.py").write_text("")
    monkeypatch.syspath_prepend(adapter.parent)
    set_options(adapter, **options)
    with pytest.raises(ConfigError, match=r"adapter_config\.json: ") as caught:
        OPENERS[opener](adapter)
    assert "\n" not in str(caught.value) and any(option in str(caught.value) for option in options)
    assert "evil_payload" not in sys.modules


OTHER_TOOLKITS: dict[str, dict[str, Any]] = {
    "ms-swift": {"lorap_emb_lr": 1e-06, "lorap_lr_ratio": 16.0, "lora_dtype": "bfloat16"},
    "unsloth": {
        "auto_mapping": {
            "base_model_class": "Qwen2ForCausalLM", "parent_library": "transformers.models.qwen2.modeling_qwen2",
            "unsloth_fixed": True,
        },
    },
    "this toolkit's model": {
        "auto_mapping": {"base_model_class": "QWenLMHeadModel", "parent_library": "qwen_model.modeling_qwen"},
    },
    "later peft": {"a_new_option": None, "another": False, "a_config": {"scale": 0.0}, "a_list": []},
    "peft": {"megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {}, "runtime_config": {
        "ephemeral_gpu_offload": False
    }},
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
}  # fmt: skip


@pytest.mark.parametrize("options", OTHER_TOOLKITS.values(), ids=[*OTHER_TOOLKITS])
@pytest.mark.parametrize("opener", [*OPENERS])
def test_option_without_effect(adapter: Path, opener: str, options: dict[str, Any]) -> None:
    set_options(adapter, **options)
    OPENERS[opener](adapter)


SLOW = "(.*.*.*.*.*.*.*.*)*x"
PATTERNS: list[dict[str, Any]] = [
    {"rank_pattern": {SLOW: 3}},
    {"alpha_pattern": {r"(([a-z]+\.?)+)+!": 3}},
    {"target_modules": rf"{SLOW}|.*c_attn"},
    {"exclude_modules": r"^(\w*\.?)*$!"},
    {"rank_pattern": {"(": 3}},
    {"target_modules": "(" * 5_000},
    {"modules_to_save": [SLOW]},
    {"layers_to_transform": [1], "layers_pattern": [SLOW]},
    {"layers_to_transform": [10**7]},
    {"layers_to_transform": -1},
    {"trainable_token_indices": {SLOW: [1]}},
]


@pytest.mark.parametrize("options", PATTERNS, ids=lambda options: " ".join(options))
@pytest.mark.parametrize("opener", ["merge", "ask", "continue"])
def test_expression_that_never_ends(adapter: Path, opener: str, options: dict[str, Any], no_wait: None) -> None:
    set_options(adapter, **options)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"adapter_config\.json: ") as caught:
        OPENERS[opener](adapter)
    assert "\n" not in str(caught.value) and any(option in str(caught.value) for option in options)
    assert time.monotonic() - start < 20


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoints.patterns.SECONDS", 0.2)


def test_expressions_of_other_toolkits(adapter: Path) -> None:
    vision = r"(?:.*?(?:h|layers).*?(?:attn|mlp).*?(?:c_attn|c_proj|w1|w2).*?)|(?:\bmodel\.layers\.[\d]{1,}\.q_proj)"
    set_options(adapter, target_modules=vision)
    model = load_adapter(load_model(CHECKPOINT, torch.float32), str(adapter), "--adapter")
    assert model.peft_config["default"].target_modules == vision
    set_options(
        adapter, target_modules=r"^(transformer(?=\.).*\.(c_attn|c_proj|w1|w2))$", rank_pattern={r"h\.\d+\.mlp\.w1": 2}
    )
    load_adapter(load_model(CHECKPOINT, torch.float32), str(adapter), "--adapter")
    read_adapter(adapter)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("r", 0, "r is 0, not a whole number from 1"),
        ("r", True, "r is true"),
        ("lora_alpha", "16", 'lora_alpha is "16", not a number'),
        ("lora_dropout", 1, "lora_dropout is 1"),
        ("bias", "some", 'bias is "some", not "none" or "all" or "lora_only"'),
        ("use_rslora", "yes", 'use_rslora is "yes", not true or false'),
        ("target_modules", {"a": 1}, 'target_modules is {"a": 1}'),
        ("target_modules", ["a", 1], r"target_modules\[1\] is 1"),
        ("rank_pattern", {"c_attn": "4"}, 'rank_pattern.c_attn is "4"'),
        ("trainable_token_indices", ["1"], r"trainable_token_indices\[0\] is \"1\""),
        ("base_model_name_or_path", ["a"], r'base_model_name_or_path is \["a"\]'),
        ("task_type", 3, "task_type is 3"),
    ],
)
def test_value_of_another_type_or_out_of_range(adapter: Path, option: str, value: Any, message: str) -> None:
    set_options(adapter, **{option: value})
    with pytest.raises(ConfigError, match=rf"adapter_config\.json: {message}"):
        load_adapter_config(adapter, "--adapter")


def test_time_limit_ends_and_restores_the_signal() -> None:
    import signal

    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match=r"more than 0\.05 seconds"), time_limit(0.05):
        while True:
            pass
    with time_limit(5):
        pass
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_missing_key_has_peft_s_default(adapter: Path) -> None:
    change_json(adapter / "adapter_config.json", r=None, lora_alpha=None)
    assert {edit.rank for edit in read_adapter(adapter).edits.values()} == {8}
