"""Facts about a checkpoint that are read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loading.config_files import find_local_folder, load_model_config, max_positions, module_names
from tests.models import TINY, copy_checkpoint

NAMES = ["lm_head", *(f"transformer.{name}" for name in ("ln_f", "wte"))]


def test_cached_hub_id(tmp_path: Path) -> None:
    commit = "0123456789012345678901234567890123456789"
    folder = tmp_path / "models--Org--Name" / "snapshots" / commit
    copy_checkpoint(folder)
    (tmp_path / "models--Org--Name" / "refs").mkdir()
    (tmp_path / "models--Org--Name" / "refs" / "main").write_text(commit)
    assert find_local_folder("Org/Name", str(tmp_path)) == folder
    for name, hub in (("Org/Other", "hf"), ("Org/Name", "modelscope"), ("..a/b", "hf"), ("/no/such/folder", "hf")):
        found = find_local_folder(name, str(tmp_path), hub)
        assert found == Path(name) and load_model_config(found) == {} and module_names(found) == []


def test_max_positions() -> None:
    assert max_positions(load_model_config(TINY)) == 2048
    assert max_positions({"n_positions": 8192, "seq_length": 2048}) == 8192
    assert max_positions({"max_position_embeddings": None}) is None


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"type": "yarn", "factor": 4.0}, 163840),
        ({"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 32768}, 40960),
        ({"type": "linear", "factor": 2.0}, 81920),
        ({"rope_type": "dynamic", "factor": 2}, 81920),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 40960),
        ({"rope_type": "default"}, 40960),
        ({"factor": 4.0}, 40960),
        (None, 40960),
        ("yarn", 40960),
    ],
)
def test_scaled_rotary_embeddings_extend_the_positions(rope: Any, expected: int) -> None:
    """As in the model cards: Qwen2.5 and Qwen3 keep max_position_embeddings and add rope_scaling."""
    for key in ("rope_scaling", "rope_parameters"):
        assert max_positions({"max_position_embeddings": 40960, key: rope}) == expected


def test_module_names_from_headers_or_index(tmp_path: Path) -> None:
    names = module_names(TINY)
    assert set(NAMES) < set(names) and "transformer.h.1.attn.c_attn" in names and len(names) == 17
    broken = copy_checkpoint(tmp_path / "broken")
    for content in (b"", b"\xff" * 64, b"\x05\0\0\0\0\0\0\0[1,2]"):
        (broken / "model.safetensors").write_bytes(content)
        assert module_names(broken) == []
    index = {"weight_map": {"a.b.weight": "x", "a.b.bias": "x"}}
    (broken / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert module_names(broken) == ["a.b"]
