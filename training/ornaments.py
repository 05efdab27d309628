"""What a run can do without: trackers, profiles, pictures. Errors only warn; they end after the result is saved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import TrainerCallback

from errors import one_line
from training.profiling import Profiler

logger = logging.getLogger(__name__)

_EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


@contextmanager
def ornament(what: str) -> Iterator[None]:
    """Log an error of the block as a warning.

    Args:
        what: what is left out after an error, as in "the loss curve".
    """
    try:
        yield
    except Exception as error:  # whatever a plotting library or a tracker raises
        logger.warning("Without %s, which failed: %s: %s", what, type(error).__name__, one_line(error))


class Ornaments:
    """Callbacks that a run can do without: those of ``--report_to`` and ``--profile_steps``.

    After its first error a callback gets no more events. The end of training reaches them when :meth:`end` is called.
    """

    def __init__(self, callbacks: Iterable[TrainerCallback]) -> None:
        self._failed: set[int] = set()
        self._ends: list[Callable[[], Any]] = []
        for callback in callbacks:
            if isinstance(callback, Profiler) or type(callback).__module__.startswith("transformers.integrations."):
                for event in _EVENTS:
                    setattr(callback, event, partial(self._call, callback, event, getattr(callback, event)))

    def end(self) -> None:
        """Pass on that training has ended."""
        ends, self._ends = self._ends, []
        for end in ends:
            end()

    def _call(
        self, callback: TrainerCallback, event: str, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if event == "on_train_end":
            self._ends.append(partial(self._guarded, callback, method, *args, **kwargs))
            return None
        return self._guarded(callback, method, *args, **kwargs)

    def _guarded(self, callback: TrainerCallback, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if id(callback) in self._failed:
            return None
        with ornament(type(callback).__name__):
            return method(*args, **kwargs)
        self._failed.add(id(callback))
        return None
