"""A checkpoint with a wrong value in any of its JSON files is loaded, or refused in one line; nothing else happens."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import ConfigError
from export.conversion import Conversion, convert_checkpoint
from loading.checkpoint import load_checkpoint, load_model
from tests.folder_faults import VALUES
from tests.models import copy_checkpoint, write_later_checkpoint

ALL = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_MORE: dict[str, dict[str, Any]] = {
    "config.json": {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "quantization_config": {}, "layer_types": [],
        "head_dim": 8, "n_embd": 32, "transformers_weights": "x", "_attn_implementation": "sdpa", "qwen_config": {},
        "auto_map": {},
        "rope_parameters": {}, "dtype": "float32", "sliding_window": 4, "converted_from": {}, "tokenizer_class": None,
    },
    "generation_config.json": {
        "temperature": 1.0, "stop_words_ids": [], "bad_words_ids": [], "cache_implementation": "x",
    },
    "tokenizer_config.json": {
        "chat_template": "", "added_tokens_decoder": {}, "pad_token": "", "extra_special_tokens": [], "init_inputs": [],
        "fast_tokenizer_files": [], "vocab_file": "x", "tokenizer_file": "x", "tokenizer_object": {},
        "errors": "ignore",
        "padding_side": "left", "additional_special_tokens": [], "extra_vocab_file": "x", "bos_token": None,
        "split_special_tokens": False,
    },
    "special_tokens_map.json": {"eos_token": "x"},
    "added_tokens.json": {"x": 1},
    "tokenizer.json": {"padding": None, "normalizer": None, "pre_tokenizer": None, "decoder": None},
}  # fmt: skip
"""Keys that the tiny checkpoints lack."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    template = _TEMPLATE + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return {
        "qwen": copy_checkpoint(folder / "qwen"),
        "qwen3": write_later_checkpoint(folder / "qwen3", "qwen3", template),
    }


def _values(key: str) -> list[object]:
    """Some of the values, other ones for each key; in the nightly profile all."""
    start = zlib.crc32(key.encode())
    return [*VALUES] if ALL else [VALUES[(start + 5 * number) % len(VALUES)] for number in range(3)]


def _mutations(content: dict[str, Any], file: str, place: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Return the content with each key changed to each value, with the key's path."""
    mutated = []
    for key in [*content, *(() if place else _MORE[file])]:
        path = f"{place}.{key}"
        mutated += [(f"{path} = {value!r:.40}", {**content, key: value}) for value in _values(file + path)]
        if isinstance(inner := content.get(key), dict) and 0 < len(inner) < 20:
            mutated += [(title, {**content, key: changed}) for title, changed in _mutations(inner, file, path)]
    return mutated


def _open(folder: Path) -> None:
    checkpoint = load_checkpoint(str(folder))
    if ALL:
        load_model(checkpoint, torch.float32)


@pytest.mark.parametrize(
    ("family", "file"),  # Qwen v1 has no tokenizer.json
    [(family, file) for family in ("qwen", "qwen3") for file in _MORE if (family, file) != ("qwen", "tokenizer.json")],
)
def test_mutated_value(originals: dict[str, Path], tmp_path: Path, family: str, file: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in originals[family].iterdir():
        (folder / path.name).symlink_to(path)
    original = originals[family] / file
    content = json.loads(original.read_text()) if original.is_file() else {}
    unexpected, refused = [], 0
    mutations = _mutations(content, file)
    for title, changed in mutations:
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_text(json.dumps(changed))
        try:
            _open(folder)
        except ConfigError as error:
            refused += 1
            if "\n" in str(error) or str(folder) not in str(error):
                unexpected.append(f"{title}: {error}")
        except Exception as error:
            unexpected.append(f"{title}: {type(error).__name__}: {error}")
    assert not unexpected, "\n".join(unexpected)
    assert refused > len(mutations) / 4


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 10**7, "num_hidden_layers is 10000000, not a whole number from 1 to 1,000"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("hidden_size", -32, "hidden_size is -32"),
        ("vocab_size", True, "vocab_size is true"),
        ("num_attention_heads", 5, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ("seq_length", "x", 'seq_length is "x", not a whole number'),
        ("seq_length", [2048], "seq_length is "),
        ("model_type", ["qwen"], "model_type is "),
        ("rotary_emb_base", "10000", "rotary_emb_base is "),
        ("torch_dtype", "load", 'torch_dtype is "load", not "float32"'),
        ("transformers_weights", "../../x.safetensors", "transformers_weights is "),
        ("_attn_implementation", "someone/kernel", "_attn_implementation is "),
        ("rope_scaling", {"type": "evil", "factor": 2}, r"rope_scaling.type is \"evil\""),
    ],
)
def test_value_of_a_config(tmp_path: Path, key: str, value: Any, message: str) -> None:
    folder = copy_checkpoint(tmp_path / "model", **{key: value})
    options = Conversion(folder, tmp_path / "out", None, None, None, False, 10**9)
    for run in (lambda: load_checkpoint(str(folder)), lambda: convert_checkpoint(options)):
        with pytest.raises(ConfigError, match=rf"config\.json: {message}"):
            run()


@pytest.mark.parametrize("name", ["../../../x", "/etc/x", "a/b", ""])
def test_name_of_a_chat_template_is_no_path(tmp_path: Path, name: str) -> None:
    folder = write_later_checkpoint(tmp_path / "model", "qwen2")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: chat_template\[0\]\.name is "):
        load_checkpoint(str(folder))
