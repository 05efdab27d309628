"""Facts about a checkpoint that are read without torch."""

from __future__ import annotations

import json
from pathlib import Path

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
