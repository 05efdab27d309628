"""What the commands that load a model with several adapters have in common: flags, and a check of packages."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from console import pip_command
from errors import ConfigError
from serving.requests import check_adapter_names

if TYPE_CHECKING:
    from serving.engine import Engine
    from serving.formats import TemplateOptions


def add_model_flags(parser: argparse.ArgumentParser, adapter_help: str, several_adapters: bool = True) -> None:
    """Add the flags of a model and its adapters.

    Args:
        several_adapters: they become the list ``adapters``, see :func:`parse_adapters`; otherwise there is one at most,
            the folder ``adapter``.
    """
    parser.add_argument("--model_name_or_path", required=True, help="checkpoint folder, or model id on a hub")
    if several_adapters:
        parser.add_argument(
            "--adapter", action="append", default=[], metavar="NAME=DIR", dest="adapters", help=adapter_help
        )
    else:
        parser.add_argument("--adapter", metavar="DIR", help=adapter_help)
    parser.add_argument("--any_base", action="store_true", help="accept adapters that were trained on other weights")
    parser.add_argument("--chat_template", metavar="FILE", help="Jinja chat template instead of the checkpoint's")
    parser.add_argument("--device_map", help="auto spreads the model over all GPUs (default: one GPU, or the CPU)")
    parser.add_argument("--kv_cache", choices=("int8", "fp8"), help="keep keys and values in 8 bits")


def add_template_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that become arguments of the checkpoint's chat template, see :func:`template_options`."""
    parser.add_argument("--thinking", choices=("on", "off"), help="whether answers begin with thinking")
    parser.add_argument(
        "--no_thinking", action="store_const", const="off", dest="thinking", help="the same as --thinking off"
    )
    parser.add_argument("--preserve_thinking", choices=("on", "off"), help="whether earlier thinking is read again")
    parser.add_argument("--reasoning_effort", metavar="VALUE", help="how much the model is told to think, such as low")


def template_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the chat template that the flags give, but for the one that ``--thinking`` decides."""
    arguments = {name: value for name, value in asdict(template_options(args)).items() if value is not None}
    arguments.pop("enable_thinking", None)
    return arguments


def template_options(args: argparse.Namespace) -> TemplateOptions:
    """Return the arguments of the chat template that the flags ask for."""
    from serving.formats import TemplateOptions

    switch = {"on": True, "off": False, None: None}
    return TemplateOptions(switch[args.thinking], switch[args.preserve_thinking], args.reasoning_effort)


def check_template_options(engine: Engine, args: argparse.Namespace) -> TemplateOptions:
    """Return :func:`template_options`; ``ConfigError`` for a flag that the checkpoint's chat template cannot fulfil."""
    from serving.formats import OptionError

    options = template_options(args)
    try:
        engine.family_of(options)
    except OptionError as error:
        flag = error.name.replace("enable_thinking", "thinking")
        raise ConfigError(f"--{flag} {getattr(args, flag)}: {error.reason}", "Leave it out") from None
    return options


def check_packages(*names: str) -> None:
    """Raise ``ConfigError`` for packages of requirements_serve.txt that are not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise ConfigError(f"{', '.join(missing)}: not installed", f"Run {pip_command('requirements_serve.txt')}")


def parse_adapters(values: Sequence[str]) -> dict[str, str]:
    """Return folders by name.

    Raises:
        ConfigError: a value is no pair, or its name cannot be used or is another one's.
    """
    adapters: dict[str, str] = {}
    for value in values:
        name, _, folder = value.partition("=")
        if not name or not folder:
            raise ConfigError(f"--adapter {value}: no name and folder", "Write NAME=DIR")
        if name in adapters:
            raise ConfigError(f"--adapter {value}: {name} is {adapters[name]} already", "Give it another name")
        adapters[name] = folder
    check_adapter_names(adapters)
    return adapters
