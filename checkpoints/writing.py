"""Checkpoint folders written: in shards, and so that nothing carries its final name until it is whole."""

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

from checkpoints.files import save_json, staged_file, sync
from checkpoints.shards import SAFETENSORS_DTYPES
from checkpoints.source import TensorSource, is_finite
from errors import ConfigError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str, flag: str = "--max_shard_size") -> int:
    """``"2GB"`` -> bytes, by the library's convention: GB is 10^9, GiB is 2^30, bare digits are bytes."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]i?B)?", text.strip())
    size = int(match[1]) * _UNITS.get(match[2], 1) if match else 0
    if size == 0:
        raise ConfigError(f"{flag} {text}: not a size", "Write it like 2GB, 500MB or 1GiB")
    return size


_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class _Entry:
    """One tensor of a weight file that is about to be written, and where its data come from, in blocks of rows."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def held(cls, name: str, tensor: Tensor) -> _Entry:
        """A tensor that is in memory."""
        return cls(name, tuple(tensor.shape), tensor.dtype, lambda: [tensor])

    @classmethod
    def of(cls, source: TensorSource, name: str) -> _Entry:
        """A tensor that is computed, or read from its file, while it is written."""
        return cls(name, source.shape(name), source.dtype(name), lambda: _rounded_blocks(source, name))


def save_checkpoint(tensors: Iterable[tuple[str, Tensor]], folder: str | Path, max_shard_size: int) -> list[Path]:
    """Write tensors as they come to ``model.safetensors``, or to numbered shards and their index.

    One shard is held in memory at a time. Shards get their final names when all of them are on disk, the index last;
    after a failure nothing of this call is left.

    Args:
        tensors: (name, tensor) pairs; each name once (leave a tied head out).
        folder: where to write; made when missing, must not hold weights yet.
        max_shard_size: bytes of tensor data in one file; a larger tensor gets a file of its own.
    Returns:
        The weight files, without the index.
    """
    return _save(
        (_Entry.held(name, tensor) for name, tensor in tensors), Path(folder), max_shard_size, lambda size: None
    )


def save_source(
    source: TensorSource,
    folder: str | Path,
    max_shard_size: int,
    on_written: Callable[[int], object] = lambda size: None,
) -> list[Path]:
    """Write a checkpoint as :func:`save_checkpoint` does, in the memory of some rows of a tensor.

    Args:
        source: each tensor is written in its ``dtype(name)``: values are rounded to it here, once.
        on_written: called with the number of bytes after each block of rows.
    Raises:
        ConfigError: a value is NaN or infinite, or becomes it in the dtype that it is written in.
    """
    entries = (_Entry.of(source, name) for name in source.names())
    return _save(entries, Path(folder), max_shard_size, on_written)


def _save(
    entries: Iterable[_Entry], folder: Path, max_shard_size: int, on_written: Callable[[int], object]
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    if present := sorted(path.name for path in folder.glob("model*.safetensors*")):
        raise ConfigError(f"{folder} already holds weights ({present[0]})", "Write to an empty folder")
    written: list[tuple[Path, list[str]]] = []
    total_size = 0
    try:
        for shard in _shards(entries, max_shard_size):
            temporary = folder / f".{len(written) + 1:05d}.partial"
            written.append((temporary, [entry.name for entry in shard]))
            _write_shard(shard, temporary, on_written)
            total_size += sum(entry.nbytes for entry in shard)
            shard.clear()
        return _publish(written, folder, total_size)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)


def _shards(entries: Iterable[_Entry], max_shard_size: int) -> Iterator[list[_Entry]]:
    shard: list[_Entry] = []
    held, seen = 0, set()
    for entry in entries:
        assert entry.name not in seen, f"{entry.name} was given twice"
        seen.add(entry.name)
        if shard and held + entry.nbytes > max_shard_size:
            yield shard
            shard, held = [], 0
        shard.append(entry)
        held += entry.nbytes
    yield shard


def _write_shard(shard: list[_Entry], path: Path, on_written: Callable[[int], object] = lambda size: None) -> None:
    """A safetensors file: the length of the header, the header as JSON, the data without gaps."""
    # Wider elements first: so each tensor begins at a multiple of its element's size.
    shard = sorted(shard, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for entry in shard:
        offsets = [place, place + entry.nbytes]
        header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        place = offsets[1]
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
            raise OSError(error.errno, error.strerror, str(path.parent)) from error
        finally:
            writer.close()
        assert file.tell() == 8 + len(text) + place, f"{path}: blocks that are not their tensors"


class _Writer:
    """Writes blocks in a thread of its own, so that the next ones are computed meanwhile; they go to the disk early.

    What is on its way there leaves the page cache: its pages serve the next blocks, fresh ones take longer than a disk.
    """

    AHEAD = 2  # blocks that wait
    SEND = 64 * 2**20

    def __init__(self, file: BufferedWriter, on_written: Callable[[int], object]) -> None:
        self._file, self._on_written = file, on_written
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[int]] = deque()
        self._kept = 0

    def write(self, tensor: Tensor) -> None:
        self._pending.append(self._thread.submit(self._write, tensor))
        self._wait(self.AHEAD)

    def finish(self) -> None:
        """Wait until everything is written; an error of the disk shows here or in ``write``."""
        self._wait(0)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _wait(self, left: int) -> None:
        while len(self._pending) > left:
            self._on_written(self._pending.popleft().result())

    def _write(self, tensor: Tensor) -> int:
        written = self._file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data))
        self._kept += written
        if self._kept > self.SEND and hasattr(os, "posix_fadvise"):  # not on every system
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._kept = 0
        return written


def _rounded_blocks(source: TensorSource, name: str) -> Iterator[Tensor]:
    dtype = source.dtype(name)
    for block in source.blocks(name):
        rounded = block.to(dtype)
        if not is_finite(rounded):
            if not is_finite(block):
                what = f"{name} holds NaN or infinity"
                raise ConfigError(what, "The checkpoint is damaged: copy or download it again")
            what = f"{name} is not finite in {str(dtype).removeprefix('torch.')}"
            raise ConfigError(what, "Try --dtype bf16 or fp32")
        yield rounded


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file in one step: it has its name when it is whole. No two tensors may share memory."""
    with staged_file(path) as staging:
        _write_shard([_Entry.held(name, tensor) for name, tensor in tensors.items()], staging)


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
    sync(folder)
    return finals
