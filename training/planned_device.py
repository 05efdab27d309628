"""The device that a run is checked for: this machine's, or the GPU of a plan."""

from __future__ import annotations

from processes import has_gpu
from training.config.args import RunArguments


def lacks_gpu(args: RunArguments) -> bool:
    """Return whether a run has no GPU; a plan has one unless it is for ``--use_cpu``."""
    return bool(args.trainer_value("use_cpu")) or not (args.plan or has_gpu())
