"""Reading and writing checkpoint folders tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.files import load_json
from checkpoints.folders import check_output_folder, staged_folder
from checkpoints.shards import MIB, fingerprint, open_checkpoint
from checkpoints.source import InDtype
from checkpoints.writing import parse_size, save_checkpoint, save_source
from errors import ConfigError
from tests.golden import REPO

TENSORS = {
    "wte": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "norm": torch.arange(4, dtype=torch.bfloat16),
    "ids": torch.arange(5),
    "head": torch.arange(8, dtype=torch.float16).reshape(2, 4),
}


def assert_holds(folder: Path, expected: dict[str, Tensor]) -> None:
    reader = open_checkpoint(folder)
    assert sorted(reader.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert name in reader
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.read(name), tensor)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("500MB", 500 * 10**6), ("10KB", 10**4), ("1GiB", 2**30), ("3MiB", 3 * 2**20), ("7KiB", 7168),
     ("1TB", 10**12), ("4096", 4096), (" 5 GB ", 5 * 10**9)],
)  # fmt: skip
def test_sizes_are_read_by_the_librarys_convention(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2gb", "2Gb", "-1GB", "1.5GB", "2 gigabytes", "0", "0GB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--max_shard_size .*2GB"):
        parse_size(text)


# ----------------------------------------------------------------------------------------------------------- reading


def test_a_single_file_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_holds(tmp_path, TENSORS)


def test_shards_are_read_by_their_index_under_any_name(tmp_path: Path) -> None:
    # Old Qwen v1 folders call their shards "model-", an index decides.
    first, second = "model-00001-of-00008.safetensors", "rest.safetensors"
    save_file({name: TENSORS[name] for name in ("wte", "ids")}, tmp_path / first)
    save_file({name: TENSORS[name] for name in ("norm", "head")}, tmp_path / second)
    weight_map = {"wte": first, "ids": first, "norm": second, "head": second}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_holds(tmp_path, TENSORS)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_read_as_tensors_only(tmp_path: Path, zipped: bool) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_holds(tmp_path, TENSORS)


def test_pickled_shards_are_read(tmp_path: Path) -> None:
    names = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    torch.save({name: TENSORS[name] for name in ("wte", "ids")}, tmp_path / names[0])
    torch.save({name: TENSORS[name] for name in ("norm", "head")}, tmp_path / names[1])
    weight_map = {"wte": names[0], "ids": names[0], "norm": names[1], "head": names[1]}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_holds(tmp_path, TENSORS)


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert_holds(tmp_path, {"a": torch.ones(1)})


class Harmful:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o700)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"wte": Harmful(tmp_path / "was_run")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "was_run").exists()


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors") -> None:
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_broken_folders_are_refused_by_the_files_name(tmp_path: Path) -> None:
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
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json has no weight_map"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [4, 60, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_file_is_refused_by_its_name(tmp_path: Path, name: str, kept: int) -> None:
    path = tmp_path / name
    if name.endswith(".bin"):
        torch.save(TENSORS, path)
    else:
        save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=rf"{name} is damaged or incomplete") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_broken_json_is_refused_by_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json: No such file"):
        load_json(path)
    path.write_text('{"a": 1,}')
    with pytest.raises(ConfigError, match=r"config\.json is not JSON: .*line 1 column 9"):
        load_json(path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json holds a list"):
        load_json(path)


# ------------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_knows_the_weights_and_not_their_place(tmp_path: Path) -> None:
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
def test_the_fingerprint_sees_a_merged_matrix(tmp_path: Path, max_shard_size: int) -> None:
    # Merging an adapter leaves embedding and head, which often stand first and last, as they are.
    tensors = {f"t{i}": torch.full((3 * MIB,), float(i)) for i in range(3)}
    save_checkpoint(tensors.items(), tmp_path / "one", max_shard_size)
    tensors["t1"] += 1e-3
    save_checkpoint(tensors.items(), tmp_path / "two", max_shard_size)
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "two")


def test_the_fingerprint_reads_little(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(10**11)  # a sparse file: reading it all would take minutes
    assert len(fingerprint(tmp_path)) == 64


# ----------------------------------------------------------------------------------------------------------- writing


def test_one_file_without_an_index_when_it_fits(tmp_path: Path) -> None:
    written = save_checkpoint(TENSORS.items(), tmp_path / "out", max_shard_size=160)
    assert sum(tensor.nbytes for tensor in TENSORS.values()) == 160
    assert written == [tmp_path / "out" / "model.safetensors"]
    assert files(tmp_path / "out") == ["model.safetensors"]
    assert_holds(tmp_path / "out", TENSORS)


def test_shards_and_their_index(tmp_path: Path) -> None:
    # 96 bytes exceed the limit alone; 8 + 40 fit in one file, 16 more do not.
    save_checkpoint(TENSORS.items(), tmp_path, max_shard_size=60)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert files(tmp_path) == [*shards, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 160},
        "weight_map": {"wte": shards[0], "norm": shards[1], "ids": shards[1], "head": shards[2]},
    }
    assert sorted(load_file(tmp_path / shards[1])) == ["ids", "norm"]
    assert_holds(tmp_path, TENSORS)


def test_the_library_opens_what_is_written(tmp_path: Path) -> None:
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


def test_only_one_shard_is_held(tmp_path: Path) -> None:
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
    assert most <= 3, "two tensors of a shard and the next one"


def test_written_files_are_readable_as_the_umask_allows(tmp_path: Path) -> None:
    save_checkpoint(TENSORS.items(), tmp_path / "out", 10**9)
    (tmp_path / "plain").touch()
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failure_leaves_no_weights(tmp_path: Path) -> None:
    seen: list[str] = []

    def failing() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in TENSORS.items():
            if name == "head":
                seen.extend(files(tmp_path))
                raise RuntimeError("the disk is gone")
            yield name, tensor

    with pytest.raises(RuntimeError, match="the disk is gone"):
        save_checkpoint(failing(), tmp_path, max_shard_size=8)
    assert len(seen) == 2, "two shards had been written when it failed"
    assert not any(name.endswith(".safetensors") for name in seen), "no shard had its final name"
    assert files(tmp_path) == []


def test_a_source_is_written_some_rows_at_a_time_and_rounded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpoints.source.BLOCK_ELEMENTS", 10)
    tensors = {**TENSORS, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 7), "table": torch.rand(13, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    written: list[int] = []
    source = open_checkpoint(tmp_path)
    save_source(source, tmp_path / "same", 10**9, written.append)
    assert_holds(tmp_path / "same", tensors)
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values()) and max(written) <= 48
    save_source(InDtype(source, torch.bfloat16), tmp_path / "half", 60)
    rounded = {name: each.bfloat16() if each.is_floating_point() else each for name, each in tensors.items()}
    assert_holds(tmp_path / "half", rounded)
    assert len(files(tmp_path / "half")) > 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_what_is_no_number_is_not_written(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(50, 2)
    tensor[49, 1] = bad
    save_file({"a": tensor.to(dtype), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"^a holds NaN or infinity"):
        save_source(open_checkpoint(tmp_path), tmp_path / "out", 10**9)
    assert files(tmp_path / "out") == []


def test_present_weights_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    save_checkpoint(TENSORS.items(), tmp_path, 10**9)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds weights \(model\.safetensors\)"):
        save_checkpoint(TENSORS.items(), tmp_path, 8)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert files(tmp_path) == ["model.safetensors"]


# ------------------------------------------------------------------------------------------------------ staged folder


@pytest.mark.parametrize("state", ["absent", "empty", "parent absent"])
def test_a_staged_folder_appears_when_it_is_whole(tmp_path: Path, state: str) -> None:
    final = tmp_path / "new" / "out" if state == "parent absent" else tmp_path / "out"
    if state == "empty":
        final.mkdir()
    with staged_folder(final) as folder:
        assert folder == final.parent / f"out.partial-{os.getpid()}"
        (folder / "file").write_text("whole")
        assert not (final / "file").exists()
    assert (final / "file").read_text() == "whole"
    assert files(final.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_of_a_staged_folder(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        raise error
    assert files(tmp_path) == []


def test_a_leftover_of_the_same_process_number_is_no_hindrance(tmp_path: Path) -> None:
    leftover = tmp_path / f"out.partial-{os.getpid()}"
    leftover.mkdir()
    (leftover / "old").touch()
    with staged_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert files(tmp_path / "out") == ["file"]


def test_what_dead_processes_have_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    dead = tmp_path / "out.partial-1"
    dead.mkdir()
    (dead / "half.safetensors").touch()
    alike = tmp_path / "out.partial.mine"
    alike.mkdir()
    with staged_folder(tmp_path / "out") as first:
        with pytest.raises(RuntimeError), staged_folder_of_another_process(tmp_path / "out"):
            assert first.is_dir() and not dead.exists()
            raise RuntimeError
        (first / "file").touch()
    assert files(tmp_path) == ["out", "out.partial.mine"]


@contextmanager
def staged_folder_of_another_process(path: Path) -> Iterator[None]:
    code = "import sys; from checkpoints.folders import staged_folder\nwith staged_folder(sys.argv[1]): input()"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=REPO, stdin=subprocess.PIPE) as process:
        other = path.with_name(f"{path.name}.partial-{process.pid}")
        while not other.is_dir():
            assert process.poll() is None
            time.sleep(0.01)
        yield
        assert other.is_dir()
    assert not other.exists(), "it ended by itself: its standard input did"


def test_a_link_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("link", "dangling"):
        with pytest.raises(ConfigError, match=rf"{name} is a symbolic link"):
            check_output_folder(tmp_path / name)


def test_taken_output_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for check in (check_output_folder, lambda path, flag: staged_folder(path, flag).__enter__()):
        with pytest.raises(ConfigError, match=r"^--output_dir .*full is not empty"):
            check(tmp_path / "full", "--output_dir")
        with pytest.raises(ConfigError, match=r"^--output_dir .*file is a file"):
            check(tmp_path / "file", "--output_dir")
    with pytest.raises(ConfigError, match=r"cannot be created: Not a directory"):
        staged_folder(tmp_path / "file" / "out").__enter__()
    assert files(tmp_path) == ["file", "full"]


def test_the_result_is_kept_when_its_place_was_taken_meanwhile(tmp_path: Path) -> None:
    message = r"cannot be replaced by the result.* result is in .*out\.partial-\d+"
    with pytest.raises(ConfigError, match=message), staged_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").touch()
    assert (folder / "file").read_text() == "whole"
