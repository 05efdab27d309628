"""The command line of ``finetune.py`` as raw values by flag, and its help. ``parsing.py`` converts the values."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from commands import CommandParser
from training.config.flags import Flag, did_you_mean, nearest
from training.config.synonyms import explain_missing, flag_meant

MOST_USED = (
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2",
    "max_grad_norm", "optim", "bf16", "fp16", "gradient_checkpointing", "eval_strategy", "eval_steps", "save_strategy",
    "save_steps", "save_total_limit", "load_best_model_at_end", "logging_steps", "report_to", "run_name",
    "train_sampling_strategy", "seed", "dataloader_num_workers", "resume_from_checkpoint", "debug",
)  # fmt: skip
_METAVARS = {"dict": "JSON", "list": "NAME", "str": "TEXT", "float": "X", "int": "N", "bool": "BOOL"}


def parse_command_line(
    argv: Sequence[str], ours: dict[str, dict[str, Flag]], trainer: dict[str, Flag], old: dict[str, Flag]
) -> dict[str, Any]:
    """Return the given flags, each with its string, its list of strings or, without an argument, its bare value.

    Prints the help and exits for ``--help`` and ``--help_all``.

    Args:
        ours: this project's flags, by the title of their group.
        trainer: transformers' flags.
        old: old names of flags.

    Raises:
        ConfigError: an unknown flag, or a flag without its value.
    """
    words = [_with_underscores(word) for word in argv]
    show_all = "--help_all" in words
    parser = _build_parser(ours, trainer, old, show_all)
    if show_all or "--help" in words or "-h" in words:
        parser.print_help()
        sys.exit(0)
    values, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(_describe_unknown(unknown[0], words, {**trainer, **old}, ours))
    return vars(values)


def _describe_unknown(
    word: str, words: Sequence[str], others: dict[str, Flag], ours: dict[str, dict[str, Flag]]
) -> str:
    """Return the message about a word that is no flag, and not the value of one either."""
    flags = {name: flag for group in (*ours.values(), others) for name, flag in group.items()}
    name = word.partition("=")[0]
    if name.startswith("-"):
        if reason := explain_missing(name.lstrip("-")):
            return f"unknown flag {name}{reason}"
        near = flag_meant(name.lstrip("-")) or nearest(name.lstrip("-"), {*flags, "config", "help_all"})
        return f"unknown flag {name}{did_you_mean(near and f'--{near}')}"
    before = next((each for each in reversed(words[: words.index(word)]) if each.startswith("--")), None)
    flag = None if before is None else flags.get(before.removeprefix("--").partition("=")[0])
    if flag is None or "list" in flag.kinds:
        return f"unknown flag {name}"
    hint = f" ({flag.hint})" if flag.hint else ""
    return f"{word} is left over: --{flag.name} takes one value, {flag.expected}{hint}"


def _with_underscores(word: str) -> str:
    """Return ``--learning_rate=1e-4`` for ``--learning-rate=1e-4``."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _build_parser(
    ours: dict[str, dict[str, Flag]], trainer: dict[str, Flag], old: dict[str, Flag], show_all: bool
) -> CommandParser:
    parser = CommandParser(
        prog="python finetune.py",
        usage="python finetune.py [--flag value ...]\n       python finetune.py FILE",
        description="Fine-tune a Qwen model on conversations. FILE is a YAML or JSON file of flags; --config FILE "
        "accepts further flags, which override it.",
        epilog=None if show_all else "--help_all lists all flags of transformers' TrainingArguments as well.",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_help_formatter,
    )
    group = parser.add_argument_group("help and config")
    group.add_argument("-h", "--help", action="store_true", help="show the most used flags and exit")
    group.add_argument("--help_all", action="store_true", help="show all flags and exit")
    group.add_argument("--config", metavar="FILE", help="YAML or JSON file of flags; the command line overrides it")
    for title, flags in ours.items():
        _add_group(parser, title, flags.values())
    _add_group(parser, "training (most used)", [trainer[name] for name in MOST_USED if name in trainer])
    others = [flag for name, flag in trainer.items() if name not in MOST_USED]
    _add_group(parser, "training (all others)", others, show_all)
    _add_group(parser, "old flags", old.values(), show_all)
    return parser


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    """Return a formatter that fills the terminal, whose columns ``COLUMNS`` may give."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 120) - 2
    return argparse.HelpFormatter(prog, max_help_position=36 if width > 90 else 24, width=width)


def _add_group(parser: CommandParser, title: str, flags: Iterable[Flag], show: bool = True) -> None:
    group = parser.add_argument_group(title) if show else parser
    for flag in flags:
        if "bool" in flag.kinds and flag.default is True:
            group.add_argument(
                f"--no_{flag.name}", dest=flag.name, action="store_const", const=False, help=argparse.SUPPRESS
            )
        nargs = "?" if flag.bare is not None else "+" if "list" in flag.kinds else None
        group.add_argument(
            f"--{flag.name}",
            nargs=nargs,  # type: ignore[arg-type]
            const=flag.bare if nargs == "?" else None,
            metavar=_metavar(flag),
            help=_help(flag) if show else argparse.SUPPRESS,
        )


def _lora_default(flag: Flag) -> str:
    return "" if flag.lora_default is None else f"; with --use_lora: {flag.lora_default}"


def _metavar(flag: Flag) -> str:
    if 0 < len(flag.words) <= 6:
        return "{" + ",".join(flag.words) + "}"
    return next(metavar for kind, metavar in _METAVARS.items() if kind in flag.kinds)


def _help(flag: Flag) -> str:
    """Return the flag's help on one line, with its default."""
    text = " ".join(flag.help.replace("%%", "%").split()) or "(see transformers' TrainingArguments)"
    default = "" if flag.default in (None, "", []) else f" (default: {flag.default}{_lora_default(flag)})"
    return (text + default).replace("%", "%%")
