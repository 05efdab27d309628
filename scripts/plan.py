"""Say before a run whether it fits: ``python -m scripts.plan --model_name_or_path DIR --use_lora --bf16``.

Rehearses one optimizer step on tensors without data: config.json is enough, and no GPU is needed. Prints the memory of
a device by component, where in the step the peak is, floating-point operations, time and bytes sent, and for a run that
does not fit the smallest changes that make it fit. Accepts all flags of finetune.py, so the arguments of a run can be
used unchanged. The exit code is 1 if the run does not fit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from commands import CommandParser, importing, run_command, set_up_logging
from outputs import check_output_file, parse_output
from processes import forget_launcher

_MOST_PROCESSES = 100_000
# Numbers: type, least, most, and what to give; more than a least that is a float.
_NUMBERS: dict[str, tuple[type[int] | type[float], float, float, str]] = {
    "gpu_memory": (float, 0.0, 1e6, "the GiB of a device, such as 80"),
    "gpus": (int, 1, _MOST_PROCESSES, f"1 to {_MOST_PROCESSES}"),
    "hosts": (int, 1, _MOST_PROCESSES, f"1 to {_MOST_PROCESSES}"),
    "share": (float, 0.0, 1.0, "more than 0 and at most 1"),
}


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
    parser.add_argument("--gpu_memory", metavar="GIB", help="memory of a device (default: that of --device)")
    parser.add_argument("--gpus", default=1, metavar="N", help="devices of each host (default: 1)")
    parser.add_argument("--hosts", default=1, metavar="N", help="hosts (default: 1)")
    parser.add_argument(
        "--share", default=0.4, metavar="X",
        help="part of the device's rate of matrix products that a step reaches, for its time (default: 0.4)",
    )  # fmt: skip
    parser.add_argument("--json", type=parse_output, metavar="OUT", help="write all figures to this file")
    args, others = parser.parse_known_args(argv)
    for name, (_, _, _, fix) in _NUMBERS.items():
        if (text := getattr(args, name)) is not None:
            if (number := _parse_number(name, text)) is None:
                parser.error(f"--{name} {text} is not valid; give {fix}")
            setattr(args, name, number)
    if args.gpus * args.hosts > _MOST_PROCESSES:
        what = f"--gpus {args.gpus} x --hosts {args.hosts} are more than {_MOST_PROCESSES} processes"
        parser.error(f"{what}; give fewer of either")
    return args, others


def _parse_number(name: str, text: str | float) -> float | None:
    """Return the number of a flag; ``None`` if it is no number, or out of range."""
    kind, least, most, _ = _NUMBERS[name]
    try:
        number = kind(text)
    except ValueError:
        return None
    return number if least <= number <= most and (kind is int or number > least) else None


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
