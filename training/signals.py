"""Signals that ask a run to stop, or to save a checkpoint, while it trains.

SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal was closed, without nohup): the run finishes the current optimizer
step, saves a checkpoint and ends. SIGUSR1: it saves a checkpoint and continues. A signal handler only records the
request; the trainer gathers the requests of all ranks once per optimizer step, so that all of them save after the same
step, whichever rank received the signal.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from types import FrameType

from errors import Terminated

logger = logging.getLogger(__name__)

# A launcher passes a terminal's Ctrl-C on to processes that have received it already: within this time it is the same.
_SAME_KEYPRESS = 1.0  # seconds


class StopRequest(IntEnum):
    """A request to a run. Of several requests the greatest counts."""

    NOTHING = 0
    SAVE = 1
    INTERRUPT = 2
    TERMINATE = 3


_REQUESTS = {
    signal.SIGUSR1: StopRequest.SAVE,
    signal.SIGINT: StopRequest.INTERRUPT,
    signal.SIGTERM: StopRequest.TERMINATE,
    signal.SIGHUP: StopRequest.TERMINATE,
}


def ignore_save_requests() -> None:
    """Ignore SIGUSR1 while there is nothing to save; its default action ends the process."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class Signals:
    """Requests to this process, and the request that all ranks have agreed on.

    Attributes:
        requested: the greatest request that this process has received.
        agreed: what all ranks do after the current step.
    """

    def __init__(self) -> None:
        self.requested = StopRequest.NOTHING
        self.agreed = StopRequest.NOTHING
        self._stop_requested_at: float | None = None

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Record signals while the block runs, and restore the former handlers after it.

        If a stop was requested, the handlers stay installed, so that a repeated signal cannot interrupt the shutdown.

        Raises:
            KeyboardInterrupt, Terminated: a stop was requested after the last step.
        """
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()  # by nohup
        before = {number: signal.signal(number, self._record) for number in _REQUESTS if number not in ignored}
        try:
            yield
            self.agree([self.requested])
            self.raise_if_requested()
        finally:
            if self.requested <= StopRequest.SAVE:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def agree(self, requests: Sequence[float]) -> None:
        """Set what all ranks do, from the requests of each."""
        self.agreed = StopRequest(max(map(int, requests)))

    def raise_if_requested(self) -> None:
        """End the run if that was agreed on. Call it after the checkpoint has been saved.

        Raises:
            KeyboardInterrupt, Terminated: a stop was agreed on.
        """
        agreed, self.agreed = self.agreed, StopRequest.NOTHING
        if agreed is StopRequest.INTERRUPT:
            raise KeyboardInterrupt
        if agreed is StopRequest.TERMINATE:
            raise Terminated
        if agreed is StopRequest.SAVE and self.requested is StopRequest.SAVE:
            self.requested = StopRequest.NOTHING

    def _record(self, number: int, frame: FrameType | None) -> None:
        now, first = time.monotonic(), self._stop_requested_at
        if number == signal.SIGINT and first is not None and now - first > _SAME_KEYPRESS:
            raise KeyboardInterrupt
        request = _REQUESTS[signal.Signals(number)]
        if request is not StopRequest.SAVE and first is None:
            self._stop_requested_at = now
            if logger.isEnabledFor(logging.INFO):
                again = ". Press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
                name = signal.Signals(number).name
                line = f"\n{name}: finishing the current step and saving a checkpoint, then ending{again}\n"
                with suppress(OSError):  # the terminal may be gone
                    os.write(2, line.encode())  # not through the logger, which the signal may have interrupted
        self.requested = max(self.requested, request)
