"""Regular expressions from an adapter's config, and a time limit for matching them; needs no torch.

peft matches them with ``re`` against the name of every module. Whether an expression is slow depends on the names, so
it is tried on these names, in the way peft does it, before peft does.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from errors import ConfigError

SECONDS = 2.0
"""Time for all expressions of an adapter; usual ones take milliseconds."""


class _TimeIsUpError(Exception):
    """Raised in the block of ``time_limit``."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt a block of Python code or a match of ``re`` that takes too long.

    Signals reach the main thread only: in other threads there is no limit.

    Raises:
        TimeoutError: the time is up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise _TimeIsUpError

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:  # the signal can also arrive here
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TimeIsUpError:
        raise TimeoutError(f"more than {seconds:g} seconds") from None
    finally:
        signal.signal(signal.SIGALRM, previous)


def check_patterns(config: Mapping[str, Any], modules: Iterable[str], place: str) -> None:
    """Check that an adapter's expressions can be matched against the names of modules within seconds.

    Args:
        config: an adapter's options (see :mod:`checkpoints.adapter_config`).
        modules: the names that they will be matched against.
        place: file or flag, for messages.

    Raises:
        ConfigError: an option is no regular expression, or takes too long.
    """
    names = list(modules)
    option = pattern = ""  # the last ones that were tried
    try:
        with time_limit(SECONDS):
            for option, pattern, expression in _expressions(config):  # noqa: B007
                match = re.compile(expression).match
                for name in names:
                    match(name)
    except (re.error, RecursionError, OverflowError) as error:
        what = f"{place}: {option} contains {pattern[:80]!r}, which is not a regular expression ({error})"
        raise ConfigError(what, "Write the modules' names instead") from error
    except TimeoutError:
        what = f"{place}: {option} contains {pattern[:80]!r}, which takes more than {SECONDS:g} seconds to match"
        raise ConfigError(what, "Write the modules' names instead, without repeated stars") from None


def module_pattern(key: str) -> str:
    """Return peft's expression for a key of ``rank_pattern`` or ``alpha_pattern``: it matches the end of a name."""
    return rf"(.*\.)?({key})$"


def _expressions(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield option, pattern, and the expression that peft makes of it; those of whole names must match to the end."""
    for option in ("target_modules", "exclude_modules"):
        if isinstance(value := config.get(option), str):
            yield option, value, rf"(?:{value})\Z"
    for option in ("rank_pattern", "alpha_pattern"):
        for key in config.get(option) or ():
            yield option, key, module_pattern(key)
