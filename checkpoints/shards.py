"""Read checkpoint folders tensor by tensor: files are memory-mapped and nothing is loaded before it is read."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints.files import check_regular, is_file, load_json, load_json_or_empty
from checkpoints.folder_kind import fix_for_no_model
from checkpoints.model_config import find_quantization
from checkpoints.names import WEIGHTS
from checkpoints.source import TensorSource
from checkpoints.whole import adapter_text_name, has_other_parts, text_name
from errors import ConfigError

MIB = 2**20
# Dtypes by their code in the header of a safetensors file.
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class _SafetensorsFile:
    """One safetensors file: its header is read, its data stay on disk."""

    def __init__(self, path: Path) -> None:
        check_regular(path)
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _broken(path, error) from error
        self.names = list(self._file.keys())
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        code = self._file.get_slice(name).get_dtype()
        return SAFETENSORS_DTYPES[code] if code in SAFETENSORS_DTYPES else self.read(name).dtype

    def read(self, name: str) -> Tensor:
        last = self._last
        if last[0] != name:  # a tensor is read in many blocks of rows
            last = self._last = name, self._file.get_tensor(name)
        return last[1]


def load_pickle(path: Path) -> Any:
    """Load a file of ``torch.save`` that contains only tensors, containers and allowed classes; no code runs."""
    # The format before torch 1.6, which DeepSpeed still writes, is no zip archive and cannot be memory-mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


class _PickleFile:
    """One memory-mapped ``.bin`` file; a pickle of anything but tensors and plain containers is refused."""

    def __init__(self, path: Path) -> None:
        check_regular(path)
        self.path = path
        try:
            state = load_pickle(path)
        except MemoryError:
            raise
        except Exception as error:  # a damaged pickle fails in any way
            raise _broken(path, error) from error
        if not isinstance(state, Mapping) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
        ):
            raise ConfigError(f"{path} does not contain named tensors", "Use the folder of a saved model")
        self._state = dict(state)
        self.names = list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def read(self, name: str) -> Tensor:
        return self._state[name]


def _broken(path: Path, error: Exception) -> ConfigError:
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
        what = f"{path} contains other Python objects than tensors, which are not loaded"
        return ConfigError(what, "Save the weights as safetensors")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ConfigError(f"{path} is damaged or incomplete ({reason})", "Copy or download this file again")


class CheckpointReader(TensorSource):
    """The tensors in the weight files of a checkpoint; built by :func:`open_checkpoint`."""

    def __init__(
        self,
        files: list[Path],
        weight_map: Mapping[str, str] | None = None,
        rename: Callable[[str], str | None] = lambda stored: stored,
    ) -> None:
        """Open the files.

        Args:
            weight_map: tensor name -> file name, from the index; if ``None``, all tensors of all files.
            rename: stored name -> the name here; ``None`` leaves the tensor out.
        """
        self.files = files
        self._places: dict[str, tuple[_SafetensorsFile | _PickleFile, str]] = {}
        for path in files:
            file = _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickleFile(path)
            names = file.names
            if weight_map is not None:
                names = [name for name, file_name in weight_map.items() if file_name == path.name]
                if missing := set(names) - set(file.names):
                    what = f"{path} lacks the tensor {min(missing)}, which the index assigns to it"
                    raise ConfigError(what, "Copy or download this file again")
            self._add(file, names, rename)

    def _add(self, file: _SafetensorsFile | _PickleFile, names: list[str], rename: Callable[[str], str | None]) -> None:
        for stored in names:
            if (name := rename(stored)) is None:
                continue
            if name in self._places and self._places[name][1] != stored:
                what = f"{self.files[0].parent} has both {self._places[name][1]} and {stored}, which are one tensor"
                raise ConfigError(what, "Copy or download the weights again")
            self._places[name] = file, stored

    def names(self) -> list[str]:
        return list(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def stored_name(self, name: str) -> str:
        """Return the name that a tensor has in its file."""
        return self._places[name][1]

    def path_of(self, name: str) -> Path:
        """Return the file that contains a tensor."""
        return self._places[name][0].path

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored = self._places[name]
        return file.shape(stored)

    def dtype(self, name: str) -> torch.dtype:
        file, stored = self._places[name]
        return file.dtype(stored)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        file, stored = self._places[name]
        tensor = file.read(stored)
        return tensor[start:stop] if tensor.dim() else tensor


def open_checkpoint(
    folder: str | Path, names: tuple[str, ...] = WEIGHTS, has_others: bool | None = None
) -> CheckpointReader:
    """Open the weights of a folder: one file or shards with an index, safetensors preferred to ``.bin``.

    Of a model with other parts beside its text model, only the text model's tensors, by their names in it alone; of an
    adapter on such a model, all tensors by the names that they have on the text model.

    Args:
        folder: a checkpoint folder.
        names: file names of the weights in order of preference (for an adapter ``adapter_model.*``).
        has_others: whether the model may have other parts; ``None``: as the folder's config.json tells.
    Raises:
        ConfigError: no weights, a missing shard, a truncated or unreadable file.
    """
    files, weight_map = _find_weights(Path(folder), names)
    if has_others is None:
        has_others = _has_other_parts(folder)
    if not set(names) <= set(WEIGHTS):
        return CheckpointReader(files, weight_map, adapter_text_name)
    return CheckpointReader(files, weight_map, *([text_name] if has_others else []))


def open_left_out(folder: str | Path) -> CheckpointReader:
    """Open the tensors of a folder that :func:`open_checkpoint` leaves out, by their stored names; there may be none.

    Raises:
        ConfigError: see :func:`open_checkpoint`.
    """
    files, weight_map = _find_weights(Path(folder), WEIGHTS)
    has_others = _has_other_parts(folder)
    return CheckpointReader(
        files, weight_map, lambda stored: stored if has_others and text_name(stored) is None else None
    )


def _has_other_parts(folder: str | Path) -> bool:
    return has_other_parts(load_json_or_empty(Path(folder) / "config.json"))


def _names_from_quantization(folder: Path) -> tuple[str, ...]:
    """Weight file names of old quantised checkpoints (gptq_model-4bit-128g.safetensors), from their config."""
    quantization = find_quantization(folder)
    if quantization is None or quantization.file_name is None:
        return ()
    return tuple(f"{quantization.file_name}.{suffix}" for suffix in ("safetensors", "bin"))


def _find_weights(folder: Path, names: tuple[str, ...]) -> tuple[list[Path], dict[str, str] | None]:
    """Return the weight files of a folder and, if they are shards, the index's map of tensor name -> file name."""
    for name in names:
        if is_file(folder / name):
            return [folder / name], None
        index = folder / f"{name}.index.json"
        if is_file(index):
            weight_map = load_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ConfigError(f"{index} has no weight_map", "Copy or download this file again")
            return _check_shards(folder, index, weight_map), weight_map
    if names == WEIGHTS and (others := _names_from_quantization(folder)):
        return _find_weights(folder, others)
    if not os.path.isdir(folder):
        raise ConfigError(f"{folder} is not a folder", "Point to the folder of a saved model")
    what = f"{folder} holds no weights ({' or '.join(names)}, one file or shards with an index)"
    fix = "Point to the folder of a saved model"
    raise ConfigError(what, fix_for_no_model(folder, fix) if names == WEIGHTS else fix)


def _check_shards(folder: Path, index: Path, weight_map: Mapping[str, object]) -> list[Path]:
    """Return the files listed in an index; raise ``ConfigError`` unless each is a weight file in the folder."""
    for tensor, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or Path(shard).name != shard
            or Path(shard).suffix not in (".safetensors", ".bin")
        ):
            what = f"{index} assigns {tensor} to {shard!r}, which is not the name of a weight file"
            raise ConfigError(what, "Use the checkpoint only if you trust its source, and download the index again")
    shards = [folder / shard for shard in sorted({str(shard) for shard in weight_map.values()})]
    for shard in shards:
        if not is_file(shard):
            raise ConfigError(f"{shard} is missing, but {index.name} lists it", "Download it again")
    return shards


def fingerprint(folder: str | Path, names: tuple[str, ...] = WEIGHTS) -> str:
    """A quick hash of a checkpoint's weights: SHA-256 over the size of each weight file and samples of its content.

    The samples are the first MiB (which contains names, shapes and dtypes), the last MiB and 4 KiB at up to 256 offsets
    in between, so that a change of any large matrix is seen. Folder and file names do not matter.

    Args:
        names: see :func:`open_checkpoint`.
    Returns:
        64 hex digits.
    Raises:
        ConfigError: the folder contains no weights.
    """
    digest = hashlib.sha256()
    for path in _find_weights(Path(folder), names)[0]:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        samples = [(offset, 4096) for offset in range(MIB, size, max(MIB, size // 256))]
        with path.open("rb") as file:
            for offset, length in [(0, MIB), *samples, (max(0, size - MIB), MIB)]:
                file.seek(offset)
                digest.update(file.read(length))
    return digest.hexdigest()
