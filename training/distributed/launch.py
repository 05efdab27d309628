"""What started this process, brought to the variables of torchrun before anything else looks for them.

torch, accelerate, transformers and DeepSpeed each search for launchers in ways of their own, some by starting MPI.
This decides it once: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``
are set for all of them, or none is. Nothing is logged, since who may log depends on ``RANK``.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from errors import ConfigError, RunError, one_line
from processes import count_processes, has_gpu

_START = "Start the processes with torchrun, which sets all of them"
_BY_HAND = "Unset it for one process; for several start them with torchrun"


@dataclass(frozen=True)
class Process:
    """Which process a launcher other than torchrun says that this is.

    Attributes:
        launcher: as people call it.
        local_rank, local_size: which process of how many on its host; ``None`` where the launcher does not say.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int | None = None
    local_size: int | None = None


def find_processes() -> None:
    """Set the variables of torchrun where torchrun, accelerate, deepspeed, mpirun or srun started several processes.

    Those that are set already win: torchrun may itself have been started by srun.

    Raises:
        ConfigError: variables that are no numbers, contradict each other or are missing; MPI is needed and not there.
    """
    process = None if "RANK" in os.environ and "WORLD_SIZE" in os.environ else _other_launcher(os.environ)
    if process is not None and _number("WORLD_SIZE", process.size) == process.size:
        _take_over(process)
    _check_variables()


def use_one_process() -> None:
    """Set the variables for one process that is alone, for libraries that want them even so."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())


# ------------------------------------------------------------------------------------------------------------ torchrun


def _check_variables() -> None:
    """Check the variables of torchrun for being complete and possible."""
    given = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]
    size = _number("WORLD_SIZE", 1)
    if not given or (size == 1 and "RANK" not in given and "LOCAL_RANK" not in given):
        return
    if size == 1 and "WORLD_SIZE" in given:
        if _number("RANK", 0) != 0:
            raise ConfigError(f"RANK={os.environ['RANK']} is not below WORLD_SIZE=1", _BY_HAND)
        if "LOCAL_RANK" in given:  # for torch and accelerate that means torch.distributed
            use_one_process()
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if name not in given:
            raise ConfigError(f"{given[0]}={os.environ[given[0]]} is set, but {name} is not", f"{_START}, or unset it")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(f"WORLD_SIZE={size} processes need {name}, which is not set", _START)
    if not 0 < _number("MASTER_PORT", 0) < 65536:
        raise ConfigError(f"MASTER_PORT={os.environ['MASTER_PORT']} is no port", "Give a free one from 1024 to 65535")
    local_size = _number("LOCAL_WORLD_SIZE", _number("LOCAL_SIZE", size))  # DeepSpeed's launcher has the shorter name
    for name, limit, limit_name in (
        ("RANK", size, "WORLD_SIZE"), ("LOCAL_RANK", local_size, "LOCAL_WORLD_SIZE"),
    ):  # fmt: skip
        if _number(name, 0) >= limit:
            what = f"{name}={os.environ[name]} is not below {limit_name}={limit}"
            raise ConfigError(what, "Ranks count from 0; start the processes with torchrun")
    if "LOCAL_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])


def _number(name: str, default: int) -> int:
    """A variable's value, which may not be negative.

    Raises:
        ConfigError: it is no such number.
    """
    value = os.environ.get(name)
    if value is None:
        return default
    if not re.fullmatch(r"\d+", value) or (name.endswith("SIZE") and int(value) == 0):
        raise ConfigError(f"{name}={value!r} is no number of processes or of one of them", _START)
    return int(value)


# ----------------------------------------------------------------------------------------------------- MPI and Slurm


def _other_launcher(environment: Mapping[str, str]) -> Process | None:
    """Several processes of Open MPI, of another MPI, or of a step of Slurm; their own launchers come before srun.

    Within Slurm an mpirun starts its daemons with srun, so that Slurm's variables speak of these.
    """
    step, pmi = _slurm_step(environment), _read(environment, "MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
    if pmi and step and (pmi.rank, pmi.size) == (step.rank, step.size):
        pmi = None  # srun itself speaks MPI's protocol: there need not be an MPI
    found = _read(
        environment, "Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ) or pmi or step  # fmt: skip
    return found if found and found.size > 1 else None


def _read(environment: Mapping[str, str], launcher: str, *names: str) -> Process | None:
    """A process of the variables for its rank, the size and, where there are such, rank and size on its host."""
    if names[0] not in environment or names[1] not in environment:
        return None
    values = [_number(name, 0) if name in environment else None for name in names]
    rank, size, *local = values
    assert rank is not None and size is not None, "looked at above"
    return Process(launcher, rank, size, *local)


def _slurm_step(environment: Mapping[str, str]) -> Process | None:
    """The task of srun that this is; the script of sbatch itself runs in no step."""
    if "SLURM_STEP_ID" not in environment:
        return None
    step = _read(environment, "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    if step is None:
        return None
    per_node = expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(environment.get("SLURM_NODEID", "0"))
    return Process(
        step.launcher, step.rank, step.size, step.local_rank, per_node[node] if node < len(per_node) else None
    )


def _take_over(process: Process) -> None:
    """Set torchrun's variables for a process of another launcher."""
    # First of all which process this is: of several that find the same fault, one reports it.
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(process.rank), str(process.size)
    local_rank, local_size = process.local_rank, process.local_size
    if process.launcher == "srun":
        os.environ.setdefault("MASTER_ADDR", _slurm_address(os.environ))
        os.environ.setdefault("MASTER_PORT", str(slurm_port(os.environ)))
    elif local_rank is None or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        local_rank, local_size = _ask_mpi(process)
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if re.fullmatch(r"[^,-][^,]*", given) and (local_size or 2) > 1:
        local_rank, local_size = 0, None  # each process was given a GPU of its own and sees no other
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if local_size is not None:
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(local_size))


def _ask_mpi(process: Process) -> tuple[int, int]:
    """Learn the first process's address and a free port of its host through MPI, and end MPI.

    It is ended at once: processes of torch may go away in ways that MPI would call a crash.

    Returns:
        Which process of its host this is, and how many there are.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # a RuntimeError where the package finds no library of MPI
        raise ConfigError(
            f"{process.launcher} started {process.size} processes, and mpi4py, through which they find each other, "
            f"cannot be used ({error})",
            "pip install mpi4py, set MASTER_ADDR and MASTER_PORT, or start with torchrun",
        ) from None
    world: Any = MPI.COMM_WORLD
    if world.Get_size() != process.size:
        MPI.Finalize()
        what = f"{process.launcher} started {process.size} processes, and mpi4py knows of {world.size}"
        raise ConfigError(
            what, "Build mpi4py with the MPI whose mpirun you call: pip install --no-binary mpi4py mpi4py"
        )
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, local_size = host.Get_rank(), host.Get_size()
    host.Free()
    address = world.bcast((_own_address(local_size == process.size), _free_port()) if process.rank == 0 else None)
    MPI.Finalize()
    os.environ.setdefault("MASTER_ADDR", address[0])
    os.environ.setdefault("MASTER_PORT", str(address[1]))
    return local_rank, local_size


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _own_address(is_only_host: bool) -> str:
    """An address of this host that others reach; Debian's own name for itself is the loopback's."""
    if is_only_host:
        return "127.0.0.1"
    try:
        named = [str(item[4][0]) for item in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    except OSError:
        named = []
    if outside := [address for address in named if not address.startswith("127.")]:
        return outside[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; the kernel chooses the address it would send from
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


# --------------------------------------------------------------------------------------------------------------- Slurm


def _slurm_address(environment: Mapping[str, str]) -> str:
    nodes = expand_nodes(environment.get("SLURM_STEP_NODELIST", ""))
    if not nodes:
        raise ConfigError(
            "SLURM_STEP_NODELIST, in which the first host is looked up, is not set", "Set MASTER_ADDR to its name"
        )
    return nodes[0]


def slurm_port(environment: Mapping[str, str]) -> int:
    """A port that all tasks of a step come to, and that other steps on the same host hardly do; below those that the
    system hands out."""
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 10_000 + (31 * job + step) % 20_000


def expand_nodes(text: str) -> list[str]:
    """The names of Slurm's list of nodes: of ``node[01-03,7],other`` node01, node02, node03, node7 and other."""
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        found = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
            found = [name + end for name in found for end in ([plain] if plain else _expand_ranges(ranges))]
        names += found
    return names


def _expand_ranges(text: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def expand_counts(text: str) -> list[int]:
    """Of Slurm's ``2(x3),1`` the numbers 2, 2, 2 and 1; what it cannot be is no number at all."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def start_processes(timeout: float, deepspeed: bool, use_cpu: bool) -> None:
    """Let the processes of a run find each other, before transformers would do it in a way of its own.

    transformers leaves the time-out out on CPUs, and DeepSpeed asks MPI where it is not told that torch knows.

    Args:
        timeout: seconds that a collective may wait for its last process.
        deepspeed: whether DeepSpeed is to use the same processes.
    """
    if count_processes() > 1 and not dist.is_initialized():
        backend = "gloo" if use_cpu or not has_gpu() else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    if deepspeed:
        from deepspeed.comm import init_distributed

        init_distributed(auto_mpi_discovery=False, verbose=False)


@contextmanager
def setting_up_processes() -> Iterator[None]:
    """Name the address and the port with what torch says when the processes do not find each other.

    Raises:
        ConfigError: the port of the first process is in use.
        RunError: the first process, or one of the others, did not come.
    """
    try:
        yield
    except RuntimeError as error:
        message, name = one_line(error), type(error).__name__
        address, port = (os.environ.get(variable, "") for variable in ("MASTER_ADDR", "MASTER_PORT"))
        if "EADDRINUSE" in message or "address already in use" in message.lower():
            raise ConfigError(
                f"MASTER_PORT={port} is in use on this host", "Give another one, such as 29501, to all processes"
            ) from error
        place = f"MASTER_ADDR={address} MASTER_PORT={port}"
        if "clients joined" in message:
            raise RunError(
                f"only some of the {os.environ.get('WORLD_SIZE')} processes came to {place} ({message})",
                "Start all of them within --ddp_timeout, with the same address and port",
            ) from error
        if "gloo" in message.lower():
            raise RunError(
                f"the processes cannot connect to each other ({message})",
                "GLOO_SOCKET_IFNAME (on GPUs NCCL_SOCKET_IFNAME too) names the network interface that joins the hosts",
            ) from error
        if name in ("DistNetworkError", "DistStoreError"):
            raise RunError(
                f"the first process cannot be reached at {place} ({message})",
                "Is it the first host's address, is the port open between the hosts, has the process been started?",
            ) from error
        raise
