"""Ranks and process group of a run, for every supported launcher.

torch, accelerate, transformers and DeepSpeed each detect launchers in their own way, some by starting MPI. Here it is
decided once: either all of torchrun's variables are set (``processes.py``) or none is. This module reads the variables
of Open MPI, other MPIs (PMI) and Slurm, and translates them. It logs nothing, because who may log depends on the rank.
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

import processes
from console import pip_command
from errors import ConfigError, RunError, one_line
from training.config.args import RunArguments


@dataclass(frozen=True)
class LaunchedProcess:
    """A process as described by a launcher other than torchrun.

    Attributes:
        launcher: its name in messages.
        local_rank, local_size: rank and number of processes on this host; ``None`` if the launcher does not set them.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int | None = None
    local_size: int | None = None


def detect_launcher() -> None:
    """Set torchrun's variables if torchrun, accelerate, deepspeed, mpirun or srun started several processes.

    Variables that are already set take precedence: torchrun may itself have been started by srun.

    Raises:
        ConfigError: variables are malformed, contradictory or missing, or MPI is required and not installed.
    """
    process = None if processes.has_rank() else _read_other_launcher(os.environ)
    if process is not None and processes.count_processes(default=process.size) == process.size:
        _translate(process)
    processes.check_variables()


# ----------------------------------------------------------------------------------------------------- MPI and Slurm


def _read_other_launcher(environment: Mapping[str, str]) -> LaunchedProcess | None:
    """Return the process of several that Open MPI, another MPI or a Slurm step started, in this order.

    Within a Slurm job, mpirun starts its daemons with srun, so Slurm's variables then describe a daemon.
    """
    step = _read_slurm_step(environment)
    pmi = _read_variables(environment, "MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
    if pmi and step and (pmi.rank, pmi.size) == (step.rank, step.size):
        pmi = None  # srun sets PMI's variables itself: no MPI need be installed
    open_mpi = _read_variables(
        environment, "Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    )  # fmt: skip
    process = open_mpi or pmi or step
    return process if process and process.size > 1 else None


def _read_variables(environment: Mapping[str, str], launcher: str, *names: str) -> LaunchedProcess | None:
    """Return the process described by the variables for rank, size and, if they exist, local rank and local size."""
    if names[0] not in environment or names[1] not in environment:
        return None
    rank, size = (processes.read_number(name, 0) for name in names[:2])
    local = [processes.read_number(name, 0) if name in environment else None for name in names[2:]]
    return LaunchedProcess(launcher, rank, size, *local)


def _read_slurm_step(environment: Mapping[str, str]) -> LaunchedProcess | None:
    """Return the task of srun that this process is. The batch script itself runs in no step."""
    if "SLURM_STEP_ID" not in environment:
        return None
    step = _read_variables(environment, "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    if step is None:
        return None
    sizes = expand_task_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(environment.get("SLURM_NODEID", "0"))
    local_size = sizes[node] if node < len(sizes) else None
    return LaunchedProcess(step.launcher, step.rank, step.size, step.local_rank, local_size)


def _translate(process: LaunchedProcess) -> None:
    """Set torchrun's variables for a process of another launcher."""
    # The rank comes first: if the rest fails on all ranks, only rank 0 reports it.
    processes.set_rank(process.rank, process.size)
    local_rank, local_size = process.local_rank, process.local_size
    if process.launcher == "srun":
        processes.set_missing(MASTER_ADDR=_slurm_address(os.environ), MASTER_PORT=slurm_port(os.environ))
    elif local_rank is None or not processes.has_master():
        local_rank, local_size = _connect_by_mpi(process)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if re.fullmatch(r"[^,-][^,]*", devices) and (local_size or 2) > 1:
        local_rank, local_size = 0, None  # each process sees one GPU of its own
    if local_rank is not None:
        processes.set_missing(LOCAL_RANK=local_rank)
    if local_size is not None:
        processes.set_missing(LOCAL_WORLD_SIZE=local_size)


def _connect_by_mpi(process: LaunchedProcess) -> tuple[int, int]:
    """Broadcast the address of rank 0 and a free port of its host through MPI, set them, and finalise MPI.

    MPI is finalised at once because processes of torch may later exit in ways that MPI reports as a crash.

    Returns:
        Local rank and number of processes on this host.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: the package finds no MPI library
        raise ConfigError(
            f"{process.launcher} started {process.size} processes, and mpi4py, which they need to exchange addresses, "
            f"cannot be used ({error})",
            f"{pip_command('mpi4py')}, set MASTER_ADDR and MASTER_PORT, or start with torchrun",
        ) from None
    world: Any = MPI.COMM_WORLD
    if world.Get_size() != process.size:
        MPI.Finalize()
        raise ConfigError(
            f"{process.launcher} started {process.size} processes, and mpi4py sees {world.size}",
            f"Build mpi4py with the MPI whose mpirun you call: {pip_command('--no-binary', 'mpi4py', 'mpi4py')}",
        )
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, local_size = host.Get_rank(), host.Get_size()
    host.Free()
    is_only_host = local_size == process.size
    master = (_own_address(is_only_host), processes.free_port()) if process.rank == 0 else None
    address, port = world.bcast(master)
    MPI.Finalize()
    processes.set_missing(MASTER_ADDR=address, MASTER_PORT=port)
    return local_rank, local_size


def _own_address(is_only_host: bool) -> str:
    """Return an address of this host that other hosts reach. On Debian its host name resolves to the loopback."""
    if is_only_host:
        return "127.0.0.1"
    try:
        addresses = [str(item[4][0]) for item in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    except OSError:
        addresses = []
    if external := [address for address in addresses if not address.startswith("127.")]:
        return external[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; the kernel selects the source address
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


# --------------------------------------------------------------------------------------------------------------- Slurm


def _slurm_address(environment: Mapping[str, str]) -> str:
    nodes = expand_node_list(environment.get("SLURM_STEP_NODELIST", ""))
    if not nodes:
        what = "SLURM_STEP_NODELIST, which names the first host, is not set"
        raise ConfigError(what, "Set MASTER_ADDR to the first host's name")
    return nodes[0]


def slurm_port(environment: Mapping[str, str]) -> int:
    """Return a port that all tasks of a Slurm step derive alike and that steps on the same host rarely share.

    It is below the range from which the system assigns ports.
    """
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 10_000 + (31 * job + step) % 20_000


def expand_node_list(text: str) -> list[str]:
    """Return the host names in a Slurm node list: ``node[01-03,7],x`` is node01, node02, node03, node7 and x."""
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
            endings = [literal] if literal else _expand_ranges(ranges)
            expanded = [name + ending for name in expanded for ending in endings]
        names += expanded
    return names


def _expand_ranges(text: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def expand_task_counts(text: str) -> list[int]:
    """Return the tasks of each node from Slurm's notation: ``2(x3),1`` is 2, 2, 2, 1. Empty if malformed."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


# ------------------------------------------------------------------------------------------------------ process group


def init_process_group(args: RunArguments) -> None:
    """Create torch's default process group if the run has several processes, before transformers does.

    transformers ignores ``--ddp_timeout`` on CPUs, and DeepSpeed asks MPI unless torch's process group exists.
    DeepSpeed requires a process group even for a single process.

    Raises:
        ConfigError: the port of rank 0 is in use.
        RunError: ranks are missing or cannot connect.
    """
    import torch.distributed as dist

    uses_deepspeed = bool(args.trainer_value("deepspeed"))
    if uses_deepspeed and processes.count_processes() == 1:
        processes.set_single_process()
    with connection_errors():
        if processes.count_processes() > 1 and not dist.is_initialized():
            backend = "gloo" if args.trainer_value("use_cpu") or not processes.has_gpu() else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, timeout=timedelta(seconds=args.trainer_value("ddp_timeout")))
        if uses_deepspeed:
            import deepspeed.ops
            from deepspeed.comm import init_distributed

            # On a CPU DeepSpeed compiles an operation that only its inference uses: minutes, and a failure without g++.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            init_distributed(auto_mpi_discovery=False, verbose=False)


@contextmanager
def connection_errors() -> Iterator[None]:
    """Add address, port and a fix to torch's errors if the processes cannot connect.

    Raises:
        ConfigError: the port of rank 0 is in use.
        RunError: ranks are missing or cannot connect.
    """
    try:
        yield
    except RuntimeError as error:
        message, name = one_line(error), type(error).__name__
        master = processes.describe_master()
        if "EADDRINUSE" in message or "address already in use" in message.lower():
            port = master.split()[-1]
            raise ConfigError(
                f"{port} is in use on this host", "Use another one, such as 29501, on all hosts"
            ) from error
        if "clients joined" in message:
            raise RunError(
                f"only some of the {processes.count_processes()} processes connected to {master} ({message})",
                "Start all of them within --ddp_timeout, with the same address and port",
            ) from error
        if "gloo" in message.lower():
            raise RunError(
                f"the processes cannot connect to each other ({message})",
                "Set GLOO_SOCKET_IFNAME (on GPUs also NCCL_SOCKET_IFNAME) to the network interface between the hosts",
            ) from error
        if name in ("DistNetworkError", "DistStoreError"):
            raise RunError(
                f"rank 0 cannot be reached at {master} ({message})",
                "Check that this is the first host's address, that the port is open between the hosts, and that rank 0 "
                "has been started",
            ) from error
        raise
