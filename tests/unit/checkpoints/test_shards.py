"""Reading checkpoint folders tensor by tensor, and their fingerprint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints.shards import MIB, fingerprint, open_checkpoint
from checkpoints.writing import save_checkpoint
from errors import ConfigError
from tests.tensors import TENSORS, assert_contains


def test_single_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_contains(tmp_path, TENSORS)


def test_shards_are_found_by_the_index_under_any_name(tmp_path: Path) -> None:
    # Old Qwen v1 checkpoints name their shards "model-"; the index decides.
    first, second = "model-00001-of-00008.safetensors", "rest.safetensors"
    save_file({name: TENSORS[name] for name in ("wte", "ids")}, tmp_path / first)
    save_file({name: TENSORS[name] for name in ("norm", "head")}, tmp_path / second)
    weight_map = {"wte": first, "ids": first, "norm": second, "head": second}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_contains(tmp_path, TENSORS)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_file(tmp_path: Path, zipped: bool) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_contains(tmp_path, TENSORS)


def test_pickled_shards(tmp_path: Path) -> None:
    names = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    torch.save({name: TENSORS[name] for name in ("wte", "ids")}, tmp_path / names[0])
    torch.save({name: TENSORS[name] for name in ("norm", "head")}, tmp_path / names[1])
    weight_map = {"wte": names[0], "ids": names[0], "norm": names[1], "head": names[1]}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_contains(tmp_path, TENSORS)


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert_contains(tmp_path, {"a": torch.ones(1)})


class Harmful:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o700)


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"wte": Harmful(tmp_path / "was_run")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "was_run").exists()


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors") -> None:
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_damaged_folder_is_refused_by_file_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere is not a folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds no weights \(model\.safetensors or pytorch_model\.bin"):
        open_checkpoint(tmp_path)

    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    save_file({"a": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors is missing"):
        open_checkpoint(tmp_path)
    save_file({"c": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(
        ConfigError, match=r"model-00002-of-00002\.safetensors lacks the tensor b, which the index assigns to it"
    ):
        open_checkpoint(tmp_path)

    write_index(tmp_path, {"a": "../model.safetensors"})
    save_file({"a": torch.ones(3)}, tmp_path.parent / "model.safetensors")
    with pytest.raises(ConfigError, match=r"is not the name of a weight file"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, [])
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json: weight_map is \[\], not an object"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [4, 60, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_file_is_refused_by_name(tmp_path: Path, name: str, length: int) -> None:
    path = tmp_path / name
    if name.endswith(".bin"):
        torch.save(TENSORS, path)
    else:
        save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ConfigError, match=rf"{name} is damaged or incomplete") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_depends_on_weights_and_not_on_the_folder(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(MIB), "b": torch.zeros(8)}
    save_checkpoint(tensors.items(), tmp_path / "one", 10**9)
    shutil.copytree(tmp_path / "one", tmp_path / "deep" / "two")
    (tmp_path / "deep" / "two" / "config.json").write_text("{}")
    first = fingerprint(tmp_path / "one")
    assert len(first) == 64
    assert fingerprint(tmp_path / "deep" / "two") == first

    tensors["b"][7] = 1  # the last four bytes of the file
    save_checkpoint(tensors.items(), tmp_path / "value", 10**9)
    save_checkpoint({"a": torch.zeros(MIB), "c": torch.zeros(8)}.items(), tmp_path / "name", 10**9)
    save_checkpoint({"a": torch.zeros(MIB), "b": torch.zeros(2, 4)}.items(), tmp_path / "shape", 10**9)
    others = {fingerprint(tmp_path / name) for name in ("value", "name", "shape")}
    assert len(others | {first}) == 4


@pytest.mark.parametrize("max_shard_size", [10**9, 13 * 10**6])
def test_fingerprint_changes_with_any_large_matrix(tmp_path: Path, max_shard_size: int) -> None:
    # Merging an adapter does not change embedding and head, which are often the first and the last tensor.
    tensors = {f"t{i}": torch.full((3 * MIB,), float(i)) for i in range(3)}
    save_checkpoint(tensors.items(), tmp_path / "one", max_shard_size)
    tensors["t1"] += 1e-3
    save_checkpoint(tensors.items(), tmp_path / "two", max_shard_size)
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "two")


def test_fingerprint_reads_samples_only(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(10**11)  # a sparse file: reading it all would take minutes
    assert len(fingerprint(tmp_path)) == 64
