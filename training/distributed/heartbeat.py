"""Detection of a hanging rank: every rank publishes its status all the time and watches the status of the others.

In a collective a rank cannot tell which rank it waits for, and it waits for half an hour. The status goes through the
store of torch.distributed, on a connection and in a thread of its own, so it is published while the main thread
computes, saves or waits.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from commands import abort_from_thread, notify_on_failure
from errors import RunError
from processes import describe_master, master_address
from training.distributed.world import World, join_world

# Seconds that a rank has to end by itself after another rank reported its failure.
_GRACE = 10.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0  # seconds between two heartbeats
_JOIN_TIMEOUT = 5.0  # seconds to wait for a thread at the end


@dataclass
class RankStatus:
    """Status that a rank publishes.

    Attributes:
        heartbeats: count while the process runs, whatever it does.
        activity: counts every sign of life of the main thread.
        progress: counts the points that all ranks pass in the same order, which shows who is behind.
        step, phase: where the rank is, for messages.
        has_ended: whether the rank has reached its end.
        failure: error message of a rank that ended with an error.
    """

    heartbeats: int = 0
    activity: int = 0
    progress: int = 0
    step: int = 0
    phase: str = "starting"
    has_ended: bool = False
    failure: str = ""

    def record_activity(self, phase: str) -> None:
        """Record that the main thread is alive, at a point that other ranks need not pass."""
        self.phase = phase
        self.activity += 1

    def record_progress(self, phase: str | None = None, step: int | None = None) -> None:
        """Record that this rank passes a point that all ranks pass in the same order."""
        self.record_activity(self.phase if phase is None else phase)
        self.progress += 1
        self.step = self.step if step is None else step


@dataclass
class HangDetector:
    """Finds the rank that the others wait for, from the status of all ranks.

    Args:
        timeout: seconds without a heartbeat, or without activity while other ranks are ahead.
    """

    timeout: float
    # By rank: last status, time of the last heartbeat, time of the last activity. By failed rank: time of the failure.
    _last: list[RankStatus] = field(default_factory=list)
    _beaten_at: list[float] = field(default_factory=list)
    _active_at: list[float] = field(default_factory=list)
    _failed_at: dict[int, float] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget all times: this process was stopped itself and has not seen what the others did."""
        self._last = []

    def check(self, statuses: Sequence[RankStatus], now: float) -> tuple[int, str] | None:
        """Return the rank that the others wait for and what is wrong with it; ``None`` if no rank hangs.

        A rank that waits in a collective has made as much progress as any other and is never returned; neither is a
        slow rank that is active.
        """
        if not self._last:
            self._last = list(statuses)
            self._beaten_at, self._active_at = [now] * len(statuses), [now] * len(statuses)
        for rank, (old, new) in enumerate(zip(self._last, statuses, strict=True)):
            if new.heartbeats != old.heartbeats or new.has_ended:
                self._beaten_at[rank] = now
            if new.activity != old.activity or new.has_ended:
                self._active_at[rank] = now
            if new.failure and now - self._failed_at.setdefault(rank, now) > min(_GRACE, self.timeout):
                return rank, f"failed: {new.failure}"
        self._last = list(statuses)
        for rank, status in enumerate(statuses):
            if (seconds := now - self._beaten_at[rank]) > self.timeout:
                return rank, f"has sent no heartbeat for {seconds:.0f} s; {_last_seen(status)}"
        furthest = max(status.progress for status in statuses)
        for rank, status in enumerate(statuses):
            seconds = now - self._active_at[rank]
            # Before the first step a rank may load for longer than others. A rank whose heartbeats are overdue is
            # reported as silent instead, when its time is up.
            is_behind = 0 < status.progress < furthest and now - self._beaten_at[rank] < self.timeout / 2
            if is_behind and seconds > self.timeout:
                return rank, f"has made no progress for {seconds:.0f} s while others wait for it; {_last_seen(status)}"
        return None


def _last_seen(status: RankStatus) -> str:
    return f"it was last seen at step {status.step}, {status.phase}"


class Heartbeat:
    """Publishes the status of this rank and aborts the process if another rank hangs.

    Args:
        timeout: seconds after which a silent or stuck rank is reported; 0 disables both.

    Attributes:
        status: the status of this rank, updated by the main thread.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self.status = RankStatus()
        self._world, self._timeout = world, timeout
        self._pause = max(_SHORTEST_PAUSE, min(timeout / 10, _LONGEST_PAUSE))
        # Time of the last successful exchange, and the status of every rank then.
        self._received: tuple[float, list[RankStatus]] = (time.monotonic(), [])
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        if world.size == 1 or not timeout:
            return
        self._keys = [str(rank) for rank in range(world.size)]
        self._store = _connect(timeout, world.name)
        self._publish()
        world.barrier("heartbeat")  # every rank has published a status
        for loop in (self._exchange_loop, self._watch_loop):
            self._threads.append(threading.Thread(target=loop, name=f"heartbeat{loop.__name__}", daemon=True))
            self._threads[-1].start()

    def report_failure(self, message: str) -> None:
        """Tell the other ranks, wherever they wait, that this rank fails; an empty message if all ranks do."""
        self.stop(message)
        if message:
            self._world.report_failure(message)
            return
        with contextlib.suppress(RunError):  # a rank has not come this far
            self._world.final_barrier()

    def finish(self) -> None:
        """End after a successful run. Rank 0 keeps watching until all ranks have ended."""
        if not self._world.is_first:
            self.stop()
        self._world.final_barrier()
        self.stop()

    def stop(self, failure: str = "") -> None:
        """Publish that this rank has ended, and stop watching."""
        self.status.failure, self.status.has_ended = failure, True
        self._stop.set()
        for thread in self._threads:
            thread.join(_JOIN_TIMEOUT)

    def _publish(self) -> None:
        self._store.set(self._keys[self._world.rank], json.dumps(asdict(self.status)))

    def _exchange_loop(self) -> None:
        """Publish this rank's status and read the others'. A call may block for ever, so another thread watches."""
        while not self._stop.is_set():
            self.status.heartbeats += 1
            try:
                self._publish()
                statuses = [RankStatus(**json.loads(text)) for text in self._store.multi_get(self._keys)]
                self._received = (time.monotonic(), statuses)
            except RuntimeError:  # the watching thread sees that nothing has been received
                with contextlib.suppress(RuntimeError):
                    self._store = _connect(self._timeout, self._world.name)
            self._stop.wait(self._pause)
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it the readers
            self._publish()

    def _watch_loop(self) -> None:
        detector, last = HangDetector(self._timeout), time.monotonic()
        while not self._stop.wait(self._pause):
            now = time.monotonic()
            if now - last > max(1.0, 3 * self._pause):  # this process itself was stopped
                detector.reset()
                self._received = (now, [])
            last, (received_at, statuses) = now, self._received
            if now - received_at > self._timeout:
                self._abort(
                    f"no message from the other processes for {now - received_at:.0f} s: "
                    f"{self._world.describe(0)}, which relays them at {describe_master()}, cannot be reached. "
                    "Its host or the network is down"
                )
            hanging = detector.check(statuses, now) if statuses else None
            if hanging is not None:
                rank, what = hanging
                self._abort(f"{self._world.describe(rank)} {what}")

    def _abort(self, message: str) -> None:
        if not self._stop.is_set():
            abort_from_thread(message)


def _connect(timeout: float, name: str) -> Any:
    """Return the store of this run on a connection of its own, which no other call of this process can block."""
    store = TCPStore(*master_address(), is_master=False, timeout=timedelta(seconds=timeout))
    return PrefixStore(f"{name}/heartbeat", store)


def join_run(heartbeat_timeout: float) -> tuple[World, Heartbeat]:
    """Return the ranks of the run and a running heartbeat. From now on a failure of this rank is reported to all."""
    world = join_world()
    heartbeat = Heartbeat(world, heartbeat_timeout)
    notify_on_failure(world.describe(world.rank), heartbeat.report_failure)
    return world, heartbeat


class HeartbeatCallback(TrainerCallback):
    """Records the progress of the Trainer in this rank's status."""

    def __init__(self, status: RankStatus) -> None:
        self.status = status

    def _record(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.status.record_progress("while saving" if control.should_save else "while training", state.global_step)

    on_train_begin = on_step_begin = on_substep_end = on_step_end = on_evaluate = on_save = on_train_end = _record

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.status.record_progress("while evaluating", state.global_step)
