"""QWenConfig: old and new names of its keys, defaults, refused values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_model.configuration_qwen import QWenConfig
from qwen_model.modeling_qwen import QWenLMHeadModel
from tests.golden import Golden, assert_logits

# Key of August 2023 -> key of December 2023.
OLD_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "padded_vocab_size": "vocab_size",
    "embd_pdrop": "emb_dropout_prob",
    "attn_pdrop": "attn_dropout_prob",
}

# Other keys of August 2023, which are ignored.
OLD_EXTRAS = {
    "activation": "swiglu",
    "apply_residual_connection_post_layernorm": False,
    "bias_dropout_fusion": True,
    "params_dtype": "torch.bfloat16",
    "pos_emb": "rotary",
    "resid_pdrop": 0.1,
    "tokenizer_type": "QWenTokenizer",
}


def old_style(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with the keys of August 2023."""
    new_to_old = {new: old for old, new in OLD_NAMES.items()}
    return {new_to_old.get(key, key): value for key, value in config.items()} | OLD_EXTRAS


def test_keys_of_august_2023() -> None:
    old = {
        "n_embd": 4096,
        "n_layer": 30,
        "n_head": 32,
        "ffn_hidden_size": 22017,
        "n_positions": 6144,
        "padded_vocab_size": 151937,
        "embd_pdrop": 0.25,
        "attn_pdrop": 0.5,
        "kv_channels": 128,
        "seq_length": 2048,
        **OLD_EXTRAS,
    }
    config = QWenConfig(**old)
    for old_name, name in OLD_NAMES.items():
        assert getattr(config, name) == old[old_name], name
        assert getattr(config, old_name) == old[old_name], old_name
        assert config.to_dict()[name] == old[old_name], name
        assert old_name not in config.to_dict(), old_name


@pytest.mark.parametrize("padded_first", [True, False])
def test_padded_vocab_size_overrides_vocab_size(padded_first: bool) -> None:
    sizes = {"padded_vocab_size": 151936, "vocab_size": 151851}
    if not padded_first:
        sizes = dict(reversed(sizes.items()))
    assert QWenConfig(**sizes).vocab_size == 151936


@torch.no_grad()
def test_old_folder_gives_the_recorded_logits(any_golden: Golden, tmp_path: Path) -> None:
    old = old_style(any_golden.config)
    assert not set(OLD_NAMES.values()) & set(old)
    (tmp_path / "config.json").write_text(json.dumps(old))
    shutil.copy(any_golden.tiny / "model.safetensors", tmp_path)
    model = QWenLMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_logits(model(input_ids=any_golden.tensors.ids("A.input_ids")).logits, any_golden.tensors, "A.eval")


def test_defaults_equal_those_of_the_published_class() -> None:
    expected = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "emb_dropout_prob": 0.0,
        "attn_dropout_prob": 0.0,
        "layer_norm_epsilon": 1e-6,
        "initializer_range": 0.02,
        "max_position_embeddings": 8192,
        "scale_attn_weights": True,
        "use_cache": True,
        "bf16": False,
        "fp16": False,
        "fp32": False,
        "kv_channels": 128,
        "rotary_pct": 1.0,
        "rotary_emb_base": 10000,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "use_flash_attn": "auto",
        "intermediate_size": 22016,
        "no_bias": True,
        "tie_word_embeddings": False,
    }
    config = QWenConfig()
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.model_type == "qwen"


def test_saving_keeps_every_key(any_golden: Golden, tmp_path: Path) -> None:
    folders = sorted(path.parent for path in any_golden.path.glob("*/config.json"))
    assert folders
    for folder in folders:
        written = json.loads((folder / "config.json").read_text())
        config = QWenConfig.from_pretrained(folder)
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        # Code beside the weights is not saved; the dtype has a new name, the library another version.
        for key in set(written) - {"auto_map", "torch_dtype", "transformers_version"}:
            assert saved[key] == written[key], (folder.name, key)
        assert saved["dtype"] == written["torch_dtype"]
        assert QWenConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@torch.no_grad()
def test_saving_a_model_keeps_parameter_names_and_logits(any_golden: Golden, tmp_path: Path) -> None:
    shapes = any_golden.load_json("checkpoints.json")["parameter_shapes"]
    present = {name: expected for name, expected in shapes.items() if (any_golden.path / name).is_dir()}
    assert present
    for name, expected in present.items():
        model = QWenLMHeadModel.from_pretrained(any_golden.path / name, dtype=torch.float32).eval()
        actual = {key: list(parameter.shape) for key, parameter in model.named_parameters()}
        assert actual == {key: shape for key, shape in expected.items() if key in actual}
        # With tied embeddings the head has no parameter of its own.
        assert set(expected) - set(actual) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
        model.save_pretrained(tmp_path / name)
        ids = torch.arange(12)[None]
        reloaded = QWenLMHeadModel.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        assert torch.equal(reloaded(input_ids=ids).logits, model(input_ids=ids).logits), name


def test_head_sizes_that_do_not_add_up_to_the_hidden_size_are_refused(any_golden: Golden) -> None:
    """The original failed in the first forward."""
    limits = any_golden.load_json("checkpoints.json")["config_limits"]
    cases = [key for key in limits if key.startswith("kv_channels=")]
    assert cases
    for case in cases:
        kv_channels, heads, hidden = (int(part.split("=")[1]) for part in case.split(","))
        with pytest.raises(ValueError, match=rf"kv_channels {kv_channels} .*hidden_size {hidden}"):
            QWenConfig(kv_channels=kv_channels, num_attention_heads=heads, hidden_size=hidden)


@pytest.mark.parametrize("needed_by", ["use_dynamic_ntk", "use_logn_attn"])
def test_missing_seq_length_is_refused_if_it_is_needed(golden_small: Path, needed_by: str) -> None:
    config = json.loads((golden_small / "tiny-qwen-small" / "config.json").read_text())
    del config["seq_length"]
    config |= {"use_dynamic_ntk": False, "use_logn_attn": False}
    QWenLMHeadModel(QWenConfig(**config))
    with pytest.raises(ValueError, match="seq_length"):
        QWenLMHeadModel(QWenConfig(**config | {needed_by: True}))


@pytest.mark.parametrize("flags", [("bf16", "fp32"), ("bf16", "fp16"), ("fp16", "fp32"), ("bf16", "fp16", "fp32")])
def test_several_precision_flags_are_refused(flags: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        QWenConfig(**dict.fromkeys(flags, True))
    assert all(flag in str(caught.value) for flag in flags)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("flag", ["bf16", "fp16", "fp32"])
def test_one_precision_flag_is_kept(flag: str) -> None:
    config = QWenConfig(**{flag: True})
    assert [name for name in ("bf16", "fp16", "fp32") if config.to_dict()[name]] == [flag]


def test_error_in_config_json_names_the_key(any_golden: Golden, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(any_golden.config | {"kv_channels": 7}))
    with pytest.raises(ValueError, match="kv_channels 7"):
        QWenConfig.from_pretrained(tmp_path)
