"""YAML and JSON files of flags. The line of each flag is kept for error messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from errors import ConfigError, one_line
from training.config.objects import read_settings

SUFFIXES = (".yaml", ".yml", ".json")
_FLAT = "Write flag: value, one per line"


class Setting(NamedTuple):
    """The value of a flag, and where it was given: ``file:line``, or empty for the command line."""

    value: Any
    where: str = ""


def load_config_file(path: str) -> dict[str, Setting]:
    """Read a file of flags.

    Raises:
        ConfigError: the file cannot be read, is not a mapping of flags to values, or contains a flag twice.
    """
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise ConfigError(f"--config {path}: not a {', '.join(SUFFIXES)} file", "Rename the file")
    text = read_settings(path, "--config")
    try:
        entries = _read_json(path, text) if suffix == ".json" else _read_yaml(path, text)
    except RecursionError as error:
        raise ConfigError(f"--config {path}: nested too deeply", _FLAT) from error
    settings: dict[str, Setting] = {}
    for name, value, line in entries:
        name = name.removeprefix("--").replace("-", "_")
        if name in settings:
            raise ConfigError(f"{path}:{line}: {name} is given twice", "Remove one of them")
        if (what := _find_foreign(value)) is not None:
            raise ConfigError(f"{path}:{line}: {name}: {what} is no value of a flag", _FLAT)
        settings[name] = Setting(value, f"{path}:{line}")
    return settings


def _find_foreign(value: Any) -> str | None:
    """Return the kind of a value that JSON does not have, such as a date or a set; ``None`` if there is none."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return "an object with a key that is no text"
        return next((found for each in value.values() if (found := _find_foreign(each))), None)
    if isinstance(value, list):
        return next((found for each in value if (found := _find_foreign(each))), None)
    return None if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


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
        """A loader of YAML 1.2 scalars: ``no`` is a string, as in ``eval_strategy: no``, and ``3e-4`` a number.

        Aliases, with which a short file can stand for a huge one, are refused.
        """

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, "aliases are not supported: repeat the value", mark)
            return super().compose_node(parent, index)

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
            raise ConfigError(f"{path}:1: not a mapping", _FLAT)
        return [(_key(loader, key), _value(loader, value, path), key.start_mark.line + 1) for key, value in root.value]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigError(f"{where}: not YAML ({getattr(error, 'problem', None) or one_line(error)})") from error
    finally:
        loader.dispose()


def _key(loader: Any, node: Any) -> str:
    """Return a key of the mapping as text, whatever its type."""
    return str(node.value) if isinstance(node.value, str) else str(loader.construct_object(node, deep=True))


def _value(loader: Any, node: Any, path: str) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (
        ValueError,
        TypeError,
        OverflowError,
        AttributeError,
    ) as error:  # as in !!int x, or a number of 5,000 digits
        where = f"{path}:{node.start_mark.line + 1}"
        raise ConfigError(f"{where}: not YAML ({one_line(error)})", _FLAT) from error
