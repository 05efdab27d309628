"""Ranks, world size and address of a run, from torchrun's environment variables.

Nothing else reads or sets ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``GROUP_WORLD_SIZE``,
``MASTER_ADDR``, ``MASTER_PORT`` and ``TORCHELASTIC_*``. ``training/distributed/launch.py`` translates the variables of
other launchers into these. Without any of them a process is the only one of its run.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from errors import ConfigError

_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
_USE_TORCHRUN = "Start the processes with torchrun, which sets all of them"


def count_processes(default: int = 1) -> int:
    """Return the number of processes of the run (world size); ``default`` if no launcher has set it.

    Raises:
        ConfigError: ``WORLD_SIZE`` is not a number.
    """
    return read_number("WORLD_SIZE", default)


def has_several_processes() -> bool:
    """Return whether the world size is not 1. Unlike ``count_processes`` it accepts a malformed ``WORLD_SIZE``."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_first() -> bool:
    """Return whether this process has rank 0."""
    return os.environ.get("RANK", "0") == "0"


def is_first_on_host() -> bool:
    """Return whether this process has local rank 0."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_restart() -> bool:
    """Return whether torchrun has started this process again after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def describe_process(with_host: bool = True) -> str:
    """Return ``rank 3`` for messages, with its host if the run has several; empty for a single process."""
    rank = os.environ.get("RANK")
    if rank is None or (rank == "0" and not has_several_processes()):
        return ""
    has_several_hosts = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    return f"rank {rank} ({socket.gethostname()})" if with_host and has_several_hosts else f"rank {rank}"


def describe_master() -> str:
    """Return the address of rank 0 for messages: ``MASTER_ADDR=... MASTER_PORT=...``."""
    return " ".join(f"{name}={os.environ.get(name, '')}" for name in ("MASTER_ADDR", "MASTER_PORT"))


def master_address() -> tuple[str, int]:
    """Return host and port on which rank 0 listens."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def has_gpu() -> bool:
    """Return whether CUDA has a device. Imports torch."""
    import torch

    return torch.cuda.is_available()


# ---------------------------------------------------------------------------------------- setting and checking them


def forget_launcher(size: int = 1) -> None:
    """Delete the variables that a launcher has left in the environment of a command that is a single process.

    Args:
        size: number of processes of the run that the command describes.
    """
    for name in list(os.environ):
        if name in _VARIABLES or name.startswith("TORCHELASTIC_"):
            del os.environ[name]
    if size > 1:
        os.environ["WORLD_SIZE"] = str(size)


def has_rank() -> bool:
    """Return whether rank and world size are set."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


@contextmanager
def without_launcher() -> Iterator[None]:
    """Hide the launcher's variables within the block, so that no library starts a process group."""
    before = dict(os.environ)
    forget_launcher()
    try:
        yield
    finally:
        os.environ |= {name: value for name, value in before.items() if name not in os.environ}


def has_master() -> bool:
    """Return whether the address of rank 0 is set."""
    return {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def set_rank(rank: int, size: int) -> None:
    """Set rank and world size."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}


def set_missing(**values: object) -> None:
    """Set each of torchrun's variables that is not set yet, as in ``set_missing(LOCAL_RANK=0)``."""
    for name, value in values.items():
        os.environ.setdefault(name, str(value))


def set_single_process() -> None:
    """Complete the variables of a run of one process, for libraries that require them even then."""
    set_missing(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1, MASTER_ADDR="127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        set_missing(MASTER_PORT=free_port())


def free_port() -> int:
    """Return a port of this host that no program listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def read_number(name: str, default: int) -> int:
    """Return the value of a launcher's variable: a rank, a count or a port.

    Raises:
        ConfigError: it is not a whole number, or a size of 0.
    """
    value = os.environ.get(name)
    if value is None:
        return default
    if not re.fullmatch(r"\d+", value) or (name.endswith("SIZE") and int(value) == 0):
        what = "a whole number above 0" if name.endswith("SIZE") else "a whole number"
        raise ConfigError(f"{name}={value!r} is not {what}", _USE_TORCHRUN)
    return int(value)


def check_variables() -> None:
    """Check that the variables are complete and consistent; complete those of a single process that has a local rank.

    Raises:
        ConfigError: a variable is missing, malformed or contradicts another one.
    """
    required = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    present = [name for name in required if name in os.environ]
    size = read_number("WORLD_SIZE", 1)
    if not present or (size == 1 and present == ["WORLD_SIZE"]):
        return
    if size == 1 and "WORLD_SIZE" in present:
        if read_number("RANK", 0) != 0:
            fix = "Unset it for a single process; start several with torchrun"
            raise ConfigError(f"RANK={os.environ['RANK']} is not below WORLD_SIZE=1", fix)
        if "LOCAL_RANK" in present:  # torch and accelerate then expect a process group
            set_single_process()
        return
    for name in required:
        if name not in present:
            what = f"{present[0]}={os.environ[present[0]]} is set, but {name} is not"
            raise ConfigError(what, f"{_USE_TORCHRUN}, or unset it")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(f"WORLD_SIZE={size} processes need {name}, which is not set", _USE_TORCHRUN)
    if not 0 < read_number("MASTER_PORT", 0) < 65536:
        raise ConfigError(f"MASTER_PORT={os.environ['MASTER_PORT']} is not a port", "Use a free one from 1024 to 65535")
    if "LOCAL_SIZE" in os.environ:  # DeepSpeed's name for it
        set_missing(LOCAL_WORLD_SIZE=read_number("LOCAL_SIZE", 1))
    for name, limit_name in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        limit = read_number(limit_name, size)
        if read_number(name, 0) >= limit:
            what = f"{name}={os.environ[name]} is not below {limit_name}={limit}"
            raise ConfigError(what, "Ranks count from 0; start the processes with torchrun")
