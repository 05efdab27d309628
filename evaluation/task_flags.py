"""Flags of ``scripts.evaluate --tasks``, checked before anything is loaded."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from console import pip_command
from errors import ConfigError
from evaluation.task_files import read_subjects
from evaluation.task_prompts import BENCHMARKS, Item, build_items

TASK_FLAGS = ("data_dir", "num_fewshot", "batch_size", "apply_chat_template", "allow_code_execution")


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of benchmarks to those of ``scripts.evaluate``."""
    group = parser.add_argument_group("known benchmarks, from files on this machine")
    group.add_argument("--tasks", metavar="NAMES", help=f"benchmarks, separated by commas: {', '.join(BENCHMARKS)}")
    group.add_argument("--data_dir", metavar="DIR", type=Path, help="has a folder for each benchmark, by its name")
    group.add_argument("--num_fewshot", type=int, metavar="N", help="examples in a prompt (default: as published)")
    group.add_argument("--batch_size", type=int, default=8, metavar="N", help="prompts computed at once (default: 8)")
    group.add_argument("--apply_chat_template", action="store_true", help="ask each prompt as the message of a user")
    group.add_argument("--allow_code_execution", action="store_true", help="run what the model writes for humaneval")


def check_task_flags(args: argparse.Namespace) -> None:
    """Check the flags of benchmarks.

    Raises:
        ConfigError: a benchmark that is unknown or is not allowed, or a flag out of range.
    """
    names = names_of(args)
    for name in names:
        if name not in BENCHMARKS:
            raise ConfigError(f"--tasks {args.tasks}: {name!r} is unknown", f"Give some of {','.join(BENCHMARKS)}")
    if args.data_dir is None:
        raise ConfigError(f"--tasks {args.tasks} needs --data_dir", "Give the folder of the benchmarks' files")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ConfigError(f"--num_fewshot {args.num_fewshot} is out of range", "Give 0 or more")
    if args.batch_size < 1:
        raise ConfigError(f"--batch_size {args.batch_size} is out of range", "Give 1 or more")
    if "humaneval" in names and args.num_fewshot:
        raise ConfigError(f"--num_fewshot {args.num_fewshot}: humaneval has no examples", "Ask it in a run of its own")
    if "humaneval" in names and not args.allow_code_execution:
        what = "--tasks humaneval runs programs that the model writes, as you and on this machine"
        raise ConfigError(what, "Allow it with --allow_code_execution, best in a container without anything of value")


def check_harness() -> None:
    """Raise ``ConfigError`` if lm_eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        what = "--tasks needs lm_eval, which is not installed"
        raise ConfigError(what, f"Install it: {pip_command('requirements_evaluate.txt')}")


def names_of(args: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in args.tasks.split(",")))


def read_items(args: argparse.Namespace) -> dict[str, list[Item]]:
    """Return the questions of each benchmark.

    Raises:
        ConfigError, DataError: see ``read_subjects`` and ``build_items``.
    """
    return {
        name: build_items(
            name, read_subjects(name, args.data_dir), args.num_fewshot, args.limit, args.seed, args.apply_chat_template
        )
        for name in names_of(args)
    }
