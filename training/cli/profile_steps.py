"""The value of ``--profile_steps``, read without torch so that a wrong one is refused at once."""

from __future__ import annotations

import re

from errors import ConfigError


def parse_profile_steps(value: str) -> tuple[int, int]:
    """``"5:8"`` to the first and the last optimizer step that are profiled, both included, counted from 1.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"([0-9]+):([0-9]+)", value)
    first, last = (int(number) for number in match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(
            f"--profile_steps {value} is no range of optimizer steps",
            "Give FIRST:LAST, both included and counted from 1, such as 5:8",
        )
    return first, last
