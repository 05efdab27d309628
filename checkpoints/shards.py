"""Checkpoint folders, read tensor by tensor: files are mapped into memory, nothing is held that is not asked for."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints.files import load_json
from checkpoints.model_config import find_quantization
from checkpoints.source import TensorSource
from errors import ConfigError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
MIB = 2**20
# What a dtype is called in the header of a safetensors file.
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


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
        return SAFETENSORS_DTYPES[code] if code in SAFETENSORS_DTYPES else self.read(name).dtype

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


class CheckpointReader(TensorSource):
    """The tensors in the files of a checkpoint. Made by :func:`open_checkpoint`."""

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

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        tensor = self._where[name].read(name)
        return tensor[start:stop] if tensor.dim() else tensor


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
            return _check_shards(folder, index, weight_map), weight_map
    if names == WEIGHTS and (others := _named_by_quantizer(folder)):
        return _find_weights(folder, others)
    what = "is no folder" if not folder.is_dir() else f"holds no weights ({' or '.join(names)}, whole or with an index)"
    raise ConfigError(f"{folder} {what}", "Point to the folder of a saved model")


def _check_shards(folder: Path, index: Path, weight_map: Mapping[str, object]) -> list[Path]:
    """The files that an index names, each of which has to lie in the folder."""
    for tensor, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or Path(shard).name != shard
            or Path(shard).suffix not in (".safetensors", ".bin")
        ):
            what = f"{index} places {tensor} in {shard!r}, which is no name of a weight file"
            raise ConfigError(what, "Use the checkpoint only if you trust where it comes from, and get the index again")
    shards = [folder / shard for shard in sorted({str(shard) for shard in weight_map.values()})]
    for shard in shards:
        if not shard.is_file():
            raise ConfigError(f"{shard} is missing though {index.name} names it", "Download it again")
    return shards


def fingerprint(folder: str | Path, names: tuple[str, ...] = WEIGHTS) -> str:
    """A quick identity of a checkpoint's weights: SHA-256 over each weight file's size and samples of its content.

    The samples are the first MiB (names, shapes and dtypes stand there), the last MiB and 4 KiB at up to 256 places in
    between, so that merging into any large matrix shows. Neither the folder's place nor the files' names matter.

    Args:
        names: see :func:`open_checkpoint`.
    Returns:
        64 hex digits.
    Raises:
        ConfigError: the folder holds no weights.
    """
    digest = hashlib.sha256()
    for path in _find_weights(Path(folder), names)[0]:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        samples = [(place, 4096) for place in range(MIB, size, max(MIB, size // 256))]
        with path.open("rb") as file:
            for place, length in [(0, MIB), *samples, (max(0, size - MIB), MIB)]:
                file.seek(place)
                digest.update(file.read(length))
    return digest.hexdigest()
