"""YAML and JSON files of flags. The line of each flag is kept for error messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from errors import ConfigError, one_line

SUFFIXES = (".yaml", ".yml", ".json")


class Setting(NamedTuple):
    """The value of a flag, and where it was given: ``file:line``, or empty for the command line."""

    value: Any
    where: str = ""


def load_config_file(path: str) -> dict[str, Setting]:
    """Read a file of flags.

    Raises:
        ConfigError: the file cannot be read, is not a mapping of flags to values, or contains a flag twice.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise ConfigError(f"--config {path}: not a {', '.join(SUFFIXES)} file", "Rename the file")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not UTF-8 ({one_line(error)})", "Save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"--config {path}: {(error.strerror or str(error)).lower()}", "Check the path") from error
    entries = _read_json(path, text) if file.suffix == ".json" else _read_yaml(path, text)
    settings: dict[str, Setting] = {}
    for name, value, line in entries:
        name = name.removeprefix("--").replace("-", "_")
        if name in settings:
            raise ConfigError(f"{path}:{line}: {name} is given twice", "Remove one of them")
        settings[name] = Setting(value, f"{path}:{line}")
    return settings


def _read_json(path: str, text: str) -> list[tuple[str, Any, int]]:
    try:
        content = json.loads(text)
    except ValueError as error:
        where = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else path
        raise ConfigError(f"{where}: not JSON ({one_line(error)})", "Write one object of flags and values") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}:1: not an object", 'Write {"flag": value, ...}')
    # The text is valid JSON. Decode its members again, one by one, to find their lines.
    decoder, entries, position = json.JSONDecoder(), [], text.index("{") + 1
    while (position := _skip(text, position, ",")) < len(text) and text[position] != "}":
        line = text.count("\n", 0, position) + 1
        name, position = decoder.raw_decode(text, position)
        value, position = decoder.raw_decode(text, _skip(text, position, ":"))
        entries.append((name, value, line))
    return entries


def _skip(text: str, position: int, separator: str) -> int:
    while text[position] in f" \t\r\n{separator}":
        position += 1
    return position


def _read_yaml(path: str, text: str) -> list[tuple[str, Any, int]]:
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):
        """A loader of YAML 1.2 scalars: ``no`` is a string, as in ``eval_strategy: no``, and ``3e-4`` a number."""

        yaml_implicit_resolvers = {
            letter: [pair for pair in pairs if not pair[0].endswith((":bool", ":float", ":int", ":timestamp"))]
            for letter, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), None)
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), None)
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
        None,
    )
    loader = Loader(text)
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}:1: not a mapping", "Write flag: value, one per line")
        return [
            (str(loader.construct_object(key)), loader.construct_object(value, deep=True), key.start_mark.line + 1)
            for key, value in root.value
        ]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigError(f"{where}: not YAML ({getattr(error, 'problem', None) or one_line(error)})") from error
    finally:
        loader.dispose()
