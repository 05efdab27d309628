"""How a run is asked to stop, or to save, while it trains.

SIGTERM and SIGINT (Ctrl-C): the optimizer step at hand is finished, a checkpoint saved, and the run ends. SIGUSR1: a
checkpoint is saved and the run goes on. A signal only leaves a note here; the trainer asks all processes for theirs
once per optimizer step, so all of them save after the same one, whichever got the signal.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType

from errors import Terminated

logger = logging.getLogger(__name__)

# A launcher passes a terminal's Ctrl-C on to processes that got it themselves: what comes so soon is the same one.
_SAME_KEYPRESS = 1.0  # seconds


class StopRequest(IntEnum):
    """What a run is asked for. Of several the greatest counts."""

    NOTHING = 0
    SAVE = 1
    INTERRUPT = 2
    TERMINATE = 3


_WISHES = {
    signal.SIGUSR1: StopRequest.SAVE,
    signal.SIGINT: StopRequest.INTERRUPT,
    signal.SIGTERM: StopRequest.TERMINATE,
}


def ignore_save_requests() -> None:
    """Let SIGUSR1 do nothing where there is nothing to save; left to itself it would end the process."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class Signals:
    """What this process has been asked for, and what all processes have agreed to do after the step at hand."""

    def __init__(self) -> None:
        self.wish = StopRequest.NOTHING
        self.agreed = StopRequest.NOTHING
        self._since: float | None = None  # when the run was first asked to stop

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note signals while the block runs; before and behind it they do what they did.

        Where the run is to stop they are still noted behind it: what is being ended is not interrupted by the same
        signal that comes once more.

        Raises:
            KeyboardInterrupt, Terminated: a signal to stop came too late for a step to be agreed on.
        """
        before = {number: signal.signal(number, self._note) for number in _WISHES}
        try:
            yield
            self.agree([self.wish])
            self.end_if_asked()
        finally:
            for number, handler in before.items() if self.wish <= StopRequest.SAVE else ():
                signal.signal(number, handler)

    def agree(self, wishes: Sequence[float]) -> None:
        """Take note of what every process has been asked for."""
        self.agreed = StopRequest(max(map(int, wishes)))

    def end_if_asked(self) -> None:
        """To be called when what was agreed has been saved.

        Raises:
            KeyboardInterrupt, Terminated: the run was asked to stop.
        """
        agreed, self.agreed = self.agreed, StopRequest.NOTHING
        if agreed is StopRequest.INTERRUPT:
            raise KeyboardInterrupt
        if agreed is StopRequest.TERMINATE:
            raise Terminated
        if agreed is StopRequest.SAVE and self.wish is StopRequest.SAVE:
            self.wish = StopRequest.NOTHING

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._since is not None and now - self._since > _SAME_KEYPRESS:
            raise KeyboardInterrupt
        wish = _WISHES[signal.Signals(number)]
        if wish is not StopRequest.SAVE and self._since is None:
            self._since = now
            if logger.isEnabledFor(logging.INFO):
                # Not by the logger: the signal may have come while that was writing.
                again = ". Ctrl-C again ends it at once" if number == signal.SIGINT else ""
                name = signal.Signals(number).name
                os.write(
                    2, f"\n{name}: finishing the step at hand and saving a checkpoint, then ending{again}\n".encode()
                )
        self.wish = max(self.wish, wish)
