"""Checkpoint folders, tensor by tensor: lazy reading, atomic sharded writing.

Reading never holds more than the tensor asked for (files are mapped into memory). Writing holds one shard, and nothing
carries its final name until it is whole: first the shards, last the index that points at them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.quantization import find_quantization
from errors import ConfigError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
MIB = 2**20
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": MIB, "GiB": 2**30, "TiB": 2**40}
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def parse_size(text: str, flag: str = "--max_shard_size") -> int:
    """``"2GB"`` -> bytes, by the library's convention: GB is 10^9, GiB is 2^30, bare digits are bytes."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]i?B)?", text.strip())
    size = int(match[1]) * _UNITS.get(match[2], 1) if match else 0
    if size == 0:
        raise ConfigError(f"{flag} {text}: not a size", "Write it like 2GB, 500MB or 1GiB")
    return size


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file, broken JSON or another type is a ``ConfigError`` that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "Check the folder's name") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}", "Copy the file again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__} where an object belongs", "Copy the file again")
    return value


# ------------------------------------------------------------------------------------------------------------ reading


class _SafetensorsFile:
    """One safetensors file, its header read, its data still on disk."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _broken(path, error) from error
        self.names = list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        code = self._file.get_slice(name).get_dtype()
        return _DTYPES[code] if code in _DTYPES else self.read(name).dtype

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class _PickleFile:
    """One ``.bin`` file of tensors, mapped into memory; anything in it but tensors and plain containers is refused."""

    def __init__(self, path: Path) -> None:
        try:
            # Files older than torch 1.6 are no zip archives and cannot be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise _broken(path, error) from error
        if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise ConfigError(f"{path} does not hold named tensors", "Use the folder of a saved model")
        self._state = dict(state)
        self.names = list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def read(self, name: str) -> Tensor:
        return self._state[name]


def _broken(path: Path, error: Exception) -> ConfigError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ConfigError(f"{path} is damaged or incomplete ({reason})", "Copy or download this file again")


class CheckpointReader:
    """The tensors of a checkpoint by name; ``read`` brings one into memory. Made by :func:`open_checkpoint`.

    A tensor that ``read`` returns may be a read-only view of the file: copy it before changing it in place.
    """

    def __init__(self, files: list[Path], weight_map: Mapping[str, str] | None = None) -> None:
        """``weight_map``: the index's tensor -> file name; without it every tensor of every file is taken."""
        self.files = files
        self._where: dict[str, _SafetensorsFile | _PickleFile] = {}
        for path in files:
            file = _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickleFile(path)
            names = file.names
            if weight_map is not None:
                names = [name for name, file_name in weight_map.items() if file_name == path.name]
                if lost := set(names) - set(file.names):
                    what = f"{path} lacks the tensor {min(lost)} that the index places there"
                    raise ConfigError(what, "Copy or download this file again")
            self._where.update(dict.fromkeys(names, file))

    def names(self) -> list[str]:
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._where[name].dtype(name)

    def read(self, name: str) -> Tensor:
        return self._where[name].read(name)


def open_checkpoint(folder: str | Path, names: tuple[str, ...] = WEIGHTS) -> CheckpointReader:
    """Open the weights of a folder: one file or shards with an index, safetensors before ``.bin``.

    Args:
        folder: a checkpoint folder.
        names: the weights' file names, in order of preference (an adapter's are ``adapter_model.*``).
    Raises:
        ConfigError: no weights, a shard that the index names is missing, a truncated or unreadable file.
    """
    files, weight_map = _find_weights(Path(folder), names)
    return CheckpointReader(files, weight_map)


def _named_by_quantizer(folder: Path) -> tuple[str, ...]:
    """Files of old quantised checkpoints, such as gptq_model-4bit-128g.safetensors, where the config names one."""
    quantization = find_quantization(folder)
    if quantization is None or quantization.file_name is None:
        return ()
    return tuple(f"{quantization.file_name}.{suffix}" for suffix in ("safetensors", "bin"))


def _find_weights(folder: Path, names: tuple[str, ...]) -> tuple[list[Path], dict[str, str] | None]:
    for name in names:
        if (folder / name).is_file():
            return [folder / name], None
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = load_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ConfigError(f"{index} has no weight_map", "Copy or download this file again")
            shards = sorted(set(weight_map.values()))
            for shard in shards:
                if Path(shard).name != shard or not (folder / shard).is_file():
                    raise ConfigError(f"{folder / shard} is missing though {index.name} names it", "Download it again")
            return [folder / shard for shard in shards], weight_map
    if names == WEIGHTS and (others := _named_by_quantizer(folder)):
        return _find_weights(folder, others)
    what = "is no folder" if not folder.is_dir() else f"holds no weights ({' or '.join(names)}, whole or with an index)"
    raise ConfigError(f"{folder} {what}", "Point to the folder of a saved model")


def fingerprint(folder: str | Path) -> str:
    """A quick identity of a checkpoint's weights: SHA-256 over each weight file's size and samples of its content.

    The samples are the first MiB (names, shapes and dtypes stand there), the last MiB and 4 KiB at up to 256 places in
    between, so that merging into any large matrix shows. Neither the folder's place nor the files' names matter.

    Returns:
        64 hex digits.
    Raises:
        ConfigError: the folder holds no weights.
    """
    digest = hashlib.sha256()
    for path in _find_weights(Path(folder), WEIGHTS)[0]:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        samples = [(place, 4096) for place in range(MIB, size, max(MIB, size // 256))]
        with path.open("rb") as file:
            for place, length in [(0, MIB), *samples, (max(0, size - MIB), MIB)]:
                file.seek(place)
                digest.update(file.read(length))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ writing


def save_checkpoint(tensors: Iterable[tuple[str, Tensor]], folder: str | Path, max_shard_size: int) -> list[Path]:
    """Write tensors as they come to ``model.safetensors``, or to numbered shards and their index.

    One shard is held in memory at a time. Shards get their final names when all of them are on disk, the index last;
    after a failure nothing of this call is left.

    Args:
        tensors: (name, tensor) pairs; each name once, no two tensors sharing memory (leave a tied head out).
        folder: where to write; made when missing, must not hold weights yet.
        max_shard_size: bytes of tensor data in one file; a larger tensor gets a file of its own.
    Returns:
        The weight files, without the index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if present := sorted(path.name for path in folder.glob("model*.safetensors*")):
        raise ConfigError(f"{folder} already holds weights ({present[0]})", "Write to an empty folder")
    written: list[tuple[Path, list[str]]] = []
    total_size = 0
    try:
        for shard in _shards(tensors, max_shard_size):
            temporary = folder / f".{len(written) + 1:05d}.partial"
            written.append((temporary, list(shard)))
            _write_shard(shard, temporary)
            total_size += sum(tensor.nbytes for tensor in shard.values())
            shard.clear()
        return _publish(written, folder, total_size)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)


def _shards(tensors: Iterable[tuple[str, Tensor]], max_shard_size: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held, seen = 0, set()
    for name, tensor in tensors:
        assert name not in seen, f"{name} was given twice"
        seen.add(name)
        if shard and held + tensor.nbytes > max_shard_size:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor.contiguous()
        held += tensor.nbytes
    yield shard


def _write_shard(shard: dict[str, Tensor], path: Path) -> None:
    try:
        # save_file makes the file readable for its owner only; it gets what the user's umask gives to any new file.
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(mode)
        _sync(path)
    except SafetensorError as error:  # the system's error, in words
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path.parent)) from error


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file in one step: it has its name when it is whole. No two tensors may share memory."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        _write_shard(tensors, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _publish(written: list[tuple[Path, list[str]]], folder: Path, total_size: int) -> list[Path]:
    """Give every shard its final name, then write the index."""
    if len(written) == 1:
        finals = [folder / "model.safetensors"]
    else:
        finals = [folder / f"model-{i:05d}-of-{len(written):05d}.safetensors" for i in range(1, len(written) + 1)]
    for (temporary, _), final in zip(written, finals, strict=True):
        os.replace(temporary, final)
    if len(written) > 1:
        weight_map = {name: final.name for (_, names), final in zip(written, finals, strict=True) for name in names}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        save_json(index, folder / "model.safetensors.index.json")
    _sync(folder)
    return finals


def save_json(value: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object in one step: the file at ``path`` is the old one or the whole new one."""
    save_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def save_text(text: str, path: Path) -> None:
    """Write a text file in UTF-8 in one step."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make the operating system write a file or a folder's entries to disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output_folder(path: str | Path, flag: str = "--output") -> None:
    """Raise ``ConfigError`` unless ``path`` is free: absent, or an empty folder."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{flag} {path} is a file", "Give a folder that does not exist yet")
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{flag} {path} is not empty", "Give a folder that does not exist yet, or empty it")


@contextmanager
def staged_folder(path: str | Path, flag: str = "--output") -> Iterator[Path]:
    """Write a folder in one step: yields ``path + ".partial-<pid>"``, which becomes ``path`` when the block ends well.

    After an error in the block (Ctrl-C too) the partial folder is removed and ``path`` is as it was.

    Raises:
        ConfigError: ``path`` is taken (see :func:`check_output_folder`) or cannot be made.
    """
    check_output_folder(path, flag)
    final = Path(path).resolve()
    staging = final.with_name(f"{final.name}.partial-{os.getpid()}")
    try:
        # A folder of this name was left by a dead process that had our number.
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        what = f"{flag} {path} cannot be made: {error.strerror}"
        raise ConfigError(what, "Choose a folder you may write to") from error
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    try:
        _sync(staging)
        os.replace(staging, final)
        _sync(final.parent)
    except OSError as error:
        # The work is done and whole: leave it to the user rather than throw it away.
        fix = f"The complete result is kept in {staging}: move it yourself"
        raise ConfigError(f"{flag} {path} cannot take the result: {error.strerror}", fix) from error
