"""``RunArguments`` from a command line and a YAML or JSON file of flags."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints.rope import with_yarn
from console import python_command
from errors import ConfigError
from loading.config_files import find_local_folder, load_model_config, max_positions
from training.config.args import (
    GROUPS,
    DataArguments,
    InvocationOptions,
    LoraArguments,
    ModelArguments,
    RunArguments,
    TrainingOptions,
)
from training.config.command_line import parse_command_line
from training.config.config_file import SUFFIXES, Setting, load_config_file
from training.config.defaults import training_defaults
from training.config.flags import Flag, did_you_mean, flags_of, nearest
from training.config.old_flags import old_flags, translate_old_flags
from training.config.synonyms import explain_missing, flag_meant
from training.config.trainer_flags import trainer_flags

# Characters of a value in a message.
_MOST_SHOWN = 200


def parse_args(argv: Sequence[str]) -> RunArguments:
    """Parse a command line, and the file given with ``--config`` or as the only argument, which it overrides.

    Raises:
        ConfigError: an unknown flag or an invalid value; the message names the flag and, for a file, the line.
    """
    ours = {title: flags_of(group) for title, group in GROUPS.items()}
    known = {name: flag for flags in ours.values() for name, flag in flags.items()}
    trainer = {name: flag for name, flag in trainer_flags().items() if name not in known}
    known |= trainer
    old = old_flags(known)
    if len(argv) == 1 and argv[0].endswith(SUFFIXES) and not argv[0].startswith("-"):
        argv = ["--config", argv[0]]
    words = parse_command_line(argv, ours, trainer, old)
    layers = [{name: Setting(value) for name, value in words.items() if name != "config"}]
    if words.get("config") is not None:
        layers.insert(0, load_config_file(words["config"]))
    values: dict[str, Any] = {}
    for layer in layers:
        converted = {name: _convert(name, setting, known | old) for name, setting in layer.items()}
        debug = converted.get("debug", Setting(False))
        if debug.where and debug.value is True:
            raise ConfigError(f"{debug.where}: debug is not allowed in a file", "Give --debug")
        values |= {name: setting.value for name, setting in translate_old_flags(converted, old).items()}
    return _build(values)


def _convert(name: str, setting: Setting, flags: dict[str, Flag]) -> Setting:
    flag, where = flags.get(name), setting.where
    if flag is None:
        hint = explain_missing(name) or did_you_mean(flag_meant(name) or nearest(name, flags))
        fix = f"{python_command('finetune.py --help_all')} lists the flags"
        raise ConfigError(f"{where}: unknown flag {name}{hint}", fix)
    try:
        return Setting(flag.convert(setting.value), where)
    except ValueError as error:
        shown = setting.value if isinstance(setting.value, str) else json.dumps(setting.value, default=str)
        shown = shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."
        if where:
            raise ConfigError(f"{where}: {name}: {shown}: {error}") from error
        fix = f"{python_command('finetune.py --help')} lists the flags"
        raise ConfigError(f"command line: --{name} {shown}: {error}", fix) from error


def _build(values: dict[str, Any]) -> RunArguments:
    """Sort values into the groups; those that remain are transformers' flags."""
    groups = {}
    for group in GROUPS.values():
        names = [item.name for item in dataclasses.fields(group)]
        groups[group] = {name: values.pop(name) for name in names if name in values}
    model, data = ModelArguments(**groups[ModelArguments]), DataArguments(**groups[DataArguments])
    if "model_max_length" not in groups[DataArguments]:
        data = _limit_length(data, model)
    if values.get("output_dir"):
        values["output_dir"] = str(Path(values["output_dir"]).expanduser())
    lora = LoraArguments(**groups[LoraArguments])
    defaults = {name: flag.default for name, flag in trainer_flags().items()}
    debug = values.get("debug")
    if isinstance(debug, bool):
        del values["debug"]
    return RunArguments(
        model=model,
        data=data,
        lora=lora,
        options=TrainingOptions(**groups[TrainingOptions]),
        trainer=values,
        trainer_defaults=defaults | training_defaults(lora.use_lora),
        debug=debug is True,
        **groups[InvocationOptions],
    )


def _limit_length(data: DataArguments, model: ModelArguments) -> DataArguments:
    """Lower the default of ``--model_max_length`` to the model's limit, if its config.json is on this disk."""
    config = load_model_config(find_local_folder(model.model_name_or_path, model.cache_dir, model.model_hub))
    positions = max_positions(with_yarn(config, model.yarn)) or data.model_max_length
    return dataclasses.replace(data, model_max_length=min(data.model_max_length, positions))
