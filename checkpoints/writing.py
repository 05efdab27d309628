"""Write checkpoint folders in shards; no file has its final name before it is complete."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.files import save_json
from checkpoints.model_config import dtype_name
from checkpoints.shards import SAFETENSORS_DTYPES
from checkpoints.source import TensorSource, is_finite, reuse_freed_memory
from errors import ConfigError
from outputs import stage, staged_file, sync

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str, flag: str = "--max_shard_size") -> int:
    """``"2GB"`` -> bytes, by the convention of transformers: GB is 10^9, GiB is 2^30, a bare number is bytes."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]i?B)?", text.strip())
    size = int(match[1]) * _UNITS.get(match[2], 1) if match else 0
    if size == 0:
        raise ConfigError(f"{flag} {text}: not a size", "Write it like 2GB, 500MB or 1GiB")
    return size


_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class _Entry:
    """A tensor to be written to a weight file; ``blocks`` returns its data as blocks of rows."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def in_memory(cls, name: str, tensor: Tensor) -> _Entry:
        return cls(name, tuple(tensor.shape), tensor.dtype, lambda: [tensor])

    @classmethod
    def from_source(cls, source: TensorSource, name: str) -> _Entry:
        """A tensor that is read or computed while it is written."""
        return cls(name, source.shape(name), source.dtype(name), lambda: _rounded_blocks(source, name))


def save_checkpoint(tensors: Iterable[tuple[str, Tensor]], folder: str | Path, max_shard_size: int) -> list[Path]:
    """Write tensors in the given order to ``model.safetensors``, or to numbered shards and their index.

    One shard is in memory at a time. Shards are renamed to their final names when all are on disk, then the index is
    written; after a failure nothing of this call is left.

    Args:
        tensors: (name, tensor) pairs with unique names, without a tied head.
        folder: created if missing; must not contain weights.
        max_shard_size: bytes of tensor data per file; a larger tensor is written to a file of its own.
    Returns:
        The weight files, without the index.
    """
    entries = (_Entry.in_memory(name, tensor) for name, tensor in tensors)
    return _save(entries, Path(folder), max_shard_size, lambda size: None)


def save_source(
    source: TensorSource,
    folder: str | Path,
    max_shard_size: int,
    on_written: Callable[[int], object] = lambda size: None,
) -> list[Path]:
    """Write a checkpoint like :func:`save_checkpoint`, with a few blocks of rows in memory at a time.

    Args:
        source: each tensor is rounded here, once, to its ``dtype(name)``.
        on_written: called with the number of bytes written after each block.
    Raises:
        ConfigError: a value is NaN or infinite, or becomes so in the dtype it is written in.
    """
    reuse_freed_memory()
    entries = (_Entry.from_source(source, name) for name in source.names())
    return _save(entries, Path(folder), max_shard_size, on_written)


def _save(
    entries: Iterable[_Entry], folder: Path, max_shard_size: int, on_written: Callable[[int], object]
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    if present := sorted(path.name for path in folder.glob("model*.safetensors*")):
        raise ConfigError(f"{folder} already holds weights ({present[0]})", "Write to an empty folder")
    written: list[tuple[Path, list[str]]] = []
    total_size = 0
    with stage(folder / "weights", str(folder), prefix=".") as staging:
        for shard in _shards(entries, max_shard_size):
            temporary = staging.path / f"{len(written) + 1:05d}"
            written.append((temporary, [entry.name for entry in shard]))
            _write_shard(shard, temporary, on_written)
            total_size += sum(entry.nbytes for entry in shard)
            shard.clear()
        return _publish(written, folder, total_size)


def _shards(entries: Iterable[_Entry], max_shard_size: int) -> Iterator[list[_Entry]]:
    shard: list[_Entry] = []
    size, seen = 0, set()
    for entry in entries:
        assert entry.name not in seen, f"{entry.name} was given twice"
        seen.add(entry.name)
        if shard and size + entry.nbytes > max_shard_size:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.nbytes
    yield shard


def _write_shard(shard: list[_Entry], path: Path, on_written: Callable[[int], object] = lambda size: None) -> None:
    """Write a safetensors file: the length of the header, the header as JSON, the tensor data without gaps."""
    # Wider elements first, so that each tensor starts at a multiple of its element size.
    shard = sorted(shard, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in shard:
        start, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        writer = _Writer(file, on_written)
        try:
            for entry in shard:
                for block in entry.blocks():
                    writer.write(block)
            writer.finish()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path.parent.parent)) from error
        finally:
            writer.close()
        assert file.tell() == 8 + len(text) + end, f"{path}: the size of some blocks is not that of their tensor"


class _Writer:
    """Writes blocks in a background thread while the next ones are computed.

    Written pages are dropped from the page cache early and reused for the next blocks: allocating fresh pages takes
    longer than a disk needs to write.
    """

    MAX_PENDING = 2  # blocks
    DROP_CACHE_BYTES = 64 * 2**20

    def __init__(self, file: BufferedWriter, on_written: Callable[[int], object]) -> None:
        self._file, self._on_written = file, on_written
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[int]] = deque()
        self._cached = 0

    def write(self, tensor: Tensor) -> None:
        self._pending.append(self._thread.submit(self._write, tensor))
        self._wait(self.MAX_PENDING)

    def finish(self) -> None:
        """Wait until all blocks are on disk; a disk error is raised here or by ``write``."""
        self._wait(0)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _wait(self, max_pending: int) -> None:
        while len(self._pending) > max_pending:
            self._on_written(self._pending.popleft().result())

    def _write(self, tensor: Tensor) -> int:
        written = self._file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data))
        self._cached += written
        if self._cached > self.DROP_CACHE_BYTES and hasattr(os, "posix_fadvise"):  # missing on some systems
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._cached = 0
        return written


def _rounded_blocks(source: TensorSource, name: str) -> Iterator[Tensor]:
    dtype = source.dtype(name)
    for block in source.blocks(name):
        rounded = block.to(dtype)
        if not is_finite(rounded):
            raise _not_finite(source.unrounded(), name, dtype)
        yield rounded


def _not_finite(source: TensorSource, name: str, dtype: torch.dtype) -> ConfigError:
    if not all(map(is_finite, source.blocks(name))):
        return ConfigError(f"{name} holds NaN or infinity", "The checkpoint is damaged: copy or download it again")
    what = f"{name} is not finite in {dtype_name(dtype)}"
    return ConfigError(what, "Try --dtype bf16 or fp32")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file in one step (see ``staged_file``). No two tensors may share memory."""
    with staged_file(path) as staging:
        _write_shard([_Entry.in_memory(name, tensor) for name, tensor in tensors.items()], staging)


def _publish(written: list[tuple[Path, list[str]]], folder: Path, total_size: int) -> list[Path]:
    """Rename the shards to their final names, then write the index."""
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
    sync(folder)
    return finals
