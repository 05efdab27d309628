"""uvicorn's server with an end that is logged, and that a second signal brings at once."""

from __future__ import annotations

import logging
import socket
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from serving.engine import Engine

_LOG = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """A server that finishes its requests after SIGTERM or Ctrl-C.

    Args:
        engine: a second signal ends its answers as they are.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine
        self._ends_answers = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal: the first one, a second, and a third, which leaves clients without an answer."""
        if not self.should_exit:
            super().handle_exit(sig, frame)
        elif not self._ends_answers:
            self._ends_answers = True
            threading.Thread(target=self._end_answers, daemon=True).start()
        else:
            logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)  # it logs every task that is cut off
            self.force_exit = True

    def _end_answers(self) -> None:
        _LOG.info("stopping at once: answers end as they are; once more leaves clients without them")
        self._engine.close(drain=False)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        started, count = time.monotonic(), len(self.server_state.tasks)
        hint = "; Ctrl-C or SIGTERM again ends their answers" if count else ""
        _LOG.info("stopping: taking no more requests, finishing %d%s", count, hint)
        await super().shutdown(sockets)
        seconds, left = time.monotonic() - started, len(self.server_state.tasks)
        _LOG.info("stopped after %.1f s: %d requests finished, %d cut off", seconds, count - left, left)
