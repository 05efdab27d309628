"""Flags that take a JSON object: as JSON text, as a file, or as an object in a file of flags."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoints.files import read_text
from checkpoints.json_rules import Rule
from errors import ConfigError, one_line
from training.config.flags import did_you_mean, nearest

MOST_BYTES = 2**20
"""Size limit of a file of settings; real ones have a few thousand bytes."""


def read_settings(path: str, flag: str) -> str:
    """Return the text of a file of settings.

    Raises:
        ConfigError: it is missing, no regular file, too large, or not UTF-8.
    """
    if not os.path.exists(path):
        raise ConfigError(f"{flag} {path}: no such file or directory", "Check the path")
    try:
        return read_text(Path(path), MOST_BYTES).removeprefix("\ufeff")
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from error


def load_object(flag: str, value: Any, fix: str = 'Write {"name": value, ...}') -> dict[str, Any]:
    """Return an object that is given as such, as JSON text, or as the path of a JSON file.

    Args:
        fix: what to do about a file or text that is none.

    Raises:
        ConfigError: it cannot be read.
    """
    if isinstance(value, dict):
        return value
    is_text = isinstance(value, str) and value.lstrip().startswith("{")
    where = f"{flag} {value}"
    try:
        content = json.loads(value if is_text else read_settings(str(value), flag))
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"{where}: nested too deeply", fix) from error
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({one_line(error)})", fix) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: not a JSON object", fix)
    return content


def check_object(
    flag: str, values: Mapping[Any, Any], rules: Mapping[str, Rule], owner: str = ""
) -> Iterator[ConfigError]:
    """Yield a fault for every key of an object that is unknown, or whose value its rule does not accept.

    Args:
        flag: the flag that the object is given with.
        owner: what takes the keys, for messages; by default the flag itself.
    """
    for key, value in values.items():
        rule = rules.get(key) if isinstance(key, str) else None
        if rule is None:
            what = f"{owner} has no argument" if owner else "there is no setting"
            hint = did_you_mean(nearest(str(key), rules))
            fix = f"Known are {', '.join(rules)}" if rules else f"Remove {flag}"
            yield ConfigError(f"{flag}: {what} {str(key)[:40]}{hint}", fix)
        elif fault := rule.find_fault(value, key):
            yield ConfigError(f"{flag}: {fault}", "Correct it")
