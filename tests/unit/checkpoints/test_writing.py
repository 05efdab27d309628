"""Writing checkpoint folders: sizes, shards and their index, rounding, and failures."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.shards import open_checkpoint
from checkpoints.source import InDtype
from checkpoints.writing import parse_size, save_checkpoint, save_source
from errors import ConfigError
from ownership import MARK
from tests.tensors import TENSORS, assert_contains, files


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("500MB", 500 * 10**6), ("10KB", 10**4), ("1GiB", 2**30), ("3MiB", 3 * 2**20), ("7KiB", 7168),
     ("1TB", 10**12), ("4096", 4096), (" 5 GB ", 5 * 10**9)],
)  # fmt: skip
def test_size_units_follow_transformers(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2gb", "2Gb", "-1GB", "1.5GB", "2 gigabytes", "0", "0GB"])
def test_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--max_shard_size .*2GB"):
        parse_size(text)


def test_small_checkpoint_is_one_file_without_index(tmp_path: Path) -> None:
    written = save_checkpoint(TENSORS.items(), tmp_path / "out", max_shard_size=160)
    assert sum(tensor.nbytes for tensor in TENSORS.values()) == 160
    assert written == [tmp_path / "out" / "model.safetensors"]
    assert files(tmp_path / "out") == ["model.safetensors"]
    assert_contains(tmp_path / "out", TENSORS)


def test_shards_and_index(tmp_path: Path) -> None:
    # 96 bytes alone exceed the limit; 8 + 40 fit in one file, 16 more do not.
    save_checkpoint(TENSORS.items(), tmp_path, max_shard_size=60)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert files(tmp_path) == [*shards, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 160},
        "weight_map": {"wte": shards[0], "norm": shards[1], "ids": shards[1], "head": shards[2]},
    }
    assert sorted(load_file(tmp_path / shards[1])) == ["ids", "norm"]
    assert_contains(tmp_path, TENSORS)


def test_transformers_loads_the_written_checkpoint(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    config.save_pretrained(tmp_path)
    save_checkpoint(model.state_dict().items(), tmp_path, max_shard_size=600)
    assert len(files(tmp_path)) > 4
    loaded, info = Qwen2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []
    most = 0

    def make() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for i in range(8):
            tensor = torch.zeros(100)
            weakref.finalize(tensor, alive.pop)
            alive.append(i)
            most = max(most, len(alive))
            yield f"t{i}", tensor
            del tensor

    save_checkpoint(make(), tmp_path, max_shard_size=800)
    assert len(files(tmp_path)) == 5
    assert most <= 3, "two tensors of a shard and the first of the next"


def test_file_mode_follows_the_umask(tmp_path: Path) -> None:
    save_checkpoint(TENSORS.items(), tmp_path / "out", 10**9)
    (tmp_path / "plain").touch()
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_failure_leaves_no_weights(tmp_path: Path) -> None:
    seen: list[str] = []

    def failing() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in TENSORS.items():
            if name == "head":
                seen.extend(files(tmp_path / ".weights.partial"))
                raise RuntimeError("the disk is gone")
            yield name, tensor

    with pytest.raises(RuntimeError, match="the disk is gone"):
        save_checkpoint(failing(), tmp_path, max_shard_size=8)
    assert len(seen) == 3 and MARK in seen, "two shards had been written when it failed"
    assert not any(name.endswith(".safetensors") for name in seen), "no shard had its final name"
    assert files(tmp_path) == []


def test_source_is_written_in_blocks_and_rounded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoints.source.BLOCK_ELEMENTS", 10)
    tensors = {**TENSORS, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 7), "table": torch.rand(13, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    written: list[int] = []
    source = open_checkpoint(tmp_path)
    save_source(source, tmp_path / "same", 10**9, written.append)
    assert_contains(tmp_path / "same", tensors)
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values()) and max(written) <= 48
    save_source(InDtype(source, torch.bfloat16), tmp_path / "half", 60)
    rounded = {name: each.bfloat16() if each.is_floating_point() else each for name, each in tensors.items()}
    assert_contains(tmp_path / "half", rounded)
    assert len(files(tmp_path / "half")) > 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_nan_and_infinity_are_refused(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(50, 2)
    tensor[49, 1] = bad
    save_file({"a": tensor.to(dtype), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"^a holds NaN or infinity"):
        save_source(open_checkpoint(tmp_path), tmp_path / "out", 10**9)
    assert files(tmp_path / "out") == []


def test_folder_with_weights_is_refused(tmp_path: Path) -> None:
    save_checkpoint(TENSORS.items(), tmp_path, 10**9)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds weights \(model\.safetensors\)"):
        save_checkpoint(TENSORS.items(), tmp_path, 8)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert files(tmp_path) == ["model.safetensors"]
