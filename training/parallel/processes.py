"""Setting up torch.distributed for the processes that a launcher started."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from training.parallel.engines import count_processes, has_gpu


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
