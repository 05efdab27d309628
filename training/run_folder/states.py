"""Pickled files of a checkpoint, checked before a library reads them: they run no code and have the expected form.

DeepSpeed and torch.distributed.checkpoint unpickle without restrictions. What passes here builds tensors, containers
and a few classes without side effects. Only headers are read, not the tensors.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import torch
from transformers.trainer_pt_utils import safe_globals

from checkpoints.shards import load_pickle
from errors import ConfigError, one_line

_FIX = "Give an earlier checkpoint"

# Without them transformers would start the optimizer, the schedule or the random numbers from scratch.
_REQUIRED = (
    ("optimizer.pt", re.compile(r"optimizer.*|global_step.*")),
    ("scheduler.pt", re.compile(r"scheduler\.pt|global_step.*")),
    ("rng_state.pth", re.compile(r"rng_state.*")),
)

# What the metadata of torch.distributed.checkpoint consists of, besides the classes of its own module.
_METADATA_NAMES = frozenset({
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"),
    ("torch", "Size"), ("torch", "device"), ("collections", "OrderedDict"),
    *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")),
    ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"),
})  # fmt: skip
# Classes in DeepSpeed's files.
_DEEPSPEED_CLASSES = (
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
# What GaLore and APOLLO keep per parameter: a matrix and a few numbers.
_PROJECTORS = (
    ("galore_torch.galore_projector", "GaLoreProjector"),
    ("apollo_torch.svd_projector", "GaLoreProjector"),
    ("apollo_torch.random_projector", "GradientProjector"),
)


def check_states(folder: Path, names: Sequence[str], only_model: bool = False) -> None:
    """Check that a checkpoint's pickled files are there and can be loaded.

    Args:
        names: of the checkpoint's files, relative to ``folder``.
        only_model: it was saved with ``--save_only_model``, without them.

    Raises:
        ConfigError: a file is missing, is damaged, would run code, or is something else than its name says.
    """
    for missing, pattern in () if only_model else _REQUIRED:
        if not any(pattern.fullmatch(name) for name in names):
            raise ConfigError(f"{folder} has no {missing}", f"{_FIX}, or train on from its weights in a new run")
    for name in names:
        path = PurePath(name)
        if path.name == ".metadata":
            _check(folder / name, _check_metadata)
        elif path.suffix in (".pt", ".pth") or name.startswith(("optimizer", "pytorch_model_fsdp")):
            state = _check(folder / name, _load) if path.suffix != ".distcp" else None
            form = next((form for pattern, form in _FORMS if pattern.fullmatch(name)), None)
            if form is not None and not form(state):
                raise ConfigError(f"{folder / name} contains something else than its name says", _FIX)
        elif name == "latest":
            _check_latest(folder / name)


def _check(path: Path, load: Callable[[Path], Any]) -> Any:
    try:
        return load(path)
    except Exception as error:  # what an unpickler raises for arbitrary bytes has no common class
        reason = _unsafe(error) or one_line(error) or type(error).__name__
        raise ConfigError(f"{path} cannot be loaded ({reason})", _FIX) from error


def _unsafe(error: Exception) -> str | None:
    """Return the reason of torch's refusal, which otherwise explains at length how to run the code anyway."""
    match = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return f"it would run {match[1]}" if match else None


def _load(path: Path) -> Any:
    with safe_globals(), torch.serialization.safe_globals(known_classes()):
        return load_pickle(path)


def known_classes() -> list[Any]:
    """Return the classes that may be in a file, of the packages that are imported."""
    import sys

    return [
        getattr(sys.modules[module], name)
        for module, name in (*_DEEPSPEED_CLASSES, *_PROJECTORS)
        if hasattr(sys.modules.get(module), name)
    ]


def _check_metadata(path: Path) -> None:
    """Check the names that a pickle imports, without executing it."""
    from torch.distributed.checkpoint import metadata

    with path.open("rb") as file:
        for module, name in _find_imports(file):
            if (module, name) in _METADATA_NAMES:
                continue
            found = getattr(metadata, str(name), None) if module == metadata.__name__ else None
            if not isinstance(found, type) or found.__module__ != module:
                raise ValueError(f"it would run {module}.{name}")


def _find_imports(file: BinaryIO) -> Iterator[tuple[str | None, str | None]]:
    """Yield module and name of everything that a pickle imports; ``None`` for a name that it computes."""
    memo: dict[int, str | None] = {}
    texts: list[str | None] = []  # that the last operations put on the stack
    argument: Any
    for operation, argument, _ in pickletools.genops(file):
        if operation.name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else int(argument)] = texts[-1] if texts else None
        elif operation.name in ("GET", "BINGET", "LONG_BINGET"):
            texts.append(memo.get(int(argument)))
        elif isinstance(argument, str) and "UNICODE" in operation.name:
            texts.append(argument)
        else:
            if operation.name in ("GLOBAL", "INST"):
                module, _, name = argument.partition(" ")
                yield module, name
            elif operation.name == "STACK_GLOBAL":
                yield (texts[-2], texts[-1]) if len(texts) > 1 else (None, None)
            elif operation.name.startswith("EXT"):
                yield None, None
            texts = []


def _check_latest(path: Path) -> None:
    """Check DeepSpeed's file with the name of the folder that it reads: a path would lead out of the checkpoint."""
    name = path.read_bytes()[:100].decode("ascii", "replace").strip()
    if not re.fullmatch(r"global_step\d+", name) or not (path.parent / name).is_dir():
        raise ConfigError(f"{path} names {name!r}, which is not a folder of the checkpoint", _FIX)


def _is_optimizer(state: Any) -> bool:
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        return False
    groups = state.get("param_groups")
    return isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    )


def _is_random_state(state: Any) -> bool:
    names = ("python", "numpy", "cpu")
    return isinstance(state, dict) and all(name in state for name in names) and isinstance(state["cpu"], torch.Tensor)


def _is_dict(state: Any) -> bool:
    return isinstance(state, dict)


_FORMS: tuple[tuple[re.Pattern[str], Callable[[Any], bool]], ...] = (
    (re.compile(r"optimizer\.pt"), _is_optimizer),
    (re.compile(r"rng_state(_\d+)?\.pth"), _is_random_state),
    (re.compile(r".*\.(pt|bin)"), _is_dict),
)
