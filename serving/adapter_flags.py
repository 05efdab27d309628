"""``--adapter NAME=DIR`` of the commands that load several adapters."""

from __future__ import annotations

from collections.abc import Sequence

from errors import ConfigError

BASE = "base"
"""Name of the model without an adapter, in a terminal chat."""


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
        if name == BASE or ":" in name:
            raise ConfigError(f"--adapter {value}: {name} cannot be its name", f"Give one without a colon, not {BASE}")
        if name in adapters:
            raise ConfigError(f"--adapter {value}: {name} is {adapters[name]} already", "Give it another name")
        adapters[name] = folder
    return adapters
