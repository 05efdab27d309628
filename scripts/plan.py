"""Say before a run whether it fits: ``python -m scripts.plan --model_name_or_path DIR --use_lora --bf16``.

Rehearses one optimizer step on tensors without data: config.json is enough, and no GPU is needed. Prints the memory of
a device by component, where in the step the peak is, floating-point operations, time and bytes sent, and for a run that
does not fit the smallest changes that make it fit. Accepts all flags of finetune.py, so the arguments of a run can be
used unchanged. The exit code is 1 if the run does not fit.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from commands import CommandParser, importing, run_command, set_up_logging
from outputs import check_output_file, parse_output
from processes import forget_launcher

_MOST_PROCESSES = 100_000


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags of this command, and the remaining arguments for finetune.py."""
    parser = CommandParser(
        prog="python -m scripts.plan",
        usage="python -m scripts.plan --model_name_or_path DIR [--data_path FILE...] [flags of finetune.py]",
        description="Say before a run whether it fits, from config.json and the flags. Without --data_path it assumes "
        "that every sample has --model_max_length tokens.",
        epilog="Accepts all flags of finetune.py as well; see python finetune.py --help.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--device", metavar="NAME", help="such as H100 or 4090 (default: the GPU of this machine, else A100)"
    )
    parser.add_argument(
        "--gpu_memory", type=float, metavar="GIB", help="memory of a device (default: that of --device)"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="devices of each host (default: 1)")
    parser.add_argument("--hosts", type=int, default=1, metavar="N", help="hosts (default: 1)")
    parser.add_argument(
        "--share", type=float, default=0.4, metavar="X",
        help="part of the device's rate of matrix products that a step reaches, for its time (default: 0.4)",
    )  # fmt: skip
    parser.add_argument("--json", type=parse_output, metavar="OUT", help="write all figures to this file")
    args, others = parser.parse_known_args(argv)
    if args.gpu_memory is not None and not 0 < args.gpu_memory < math.inf:
        parser.error(f"--gpu_memory {args.gpu_memory:g} is out of range; give the GiB of a device, such as 80")
    for name in ("gpus", "hosts"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is out of range; give 1 or more")
    if args.gpus * args.hosts > _MOST_PROCESSES:
        parser.error(f"--gpus {args.gpus} x --hosts {args.hosts} are more than {_MOST_PROCESSES} processes")
    if not 0 < args.share <= 1:
        parser.error(f"--share {args.share:g} is out of range; give more than 0 and at most 1")
    return args, others


def main(argv: Sequence[str]) -> int:
    forget_launcher()
    args, others = parse_args(argv)
    from planning.devices import find_device
    from planning.expectation import Machine
    from training.checks import check_args
    from training.config.parsing import parse_args as parse_run_args

    set_up_logging()
    run = parse_run_args([*others, "--plan"])
    forget_launcher(args.gpus * args.hosts)
    try:
        check_args(run)
    finally:
        forget_launcher()
    if args.json is not None:
        check_output_file(args.json, "--json")
    device = find_device(args.device, bool(run.trainer_value("use_cpu")))
    memory = args.gpu_memory or round(device.memory_gib, 1)

    with importing():
        from planning.command import show_plan

    return show_plan(run, Machine(device, memory, args.gpus, args.hosts, args.share), args.json)


if __name__ == "__main__":
    run_command(main, "scripts.plan", prints_result=True)
