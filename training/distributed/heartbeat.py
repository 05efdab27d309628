"""Which process hangs: every process says again and again that it lives and how far it is, and looks at the others.

In a collective a process cannot tell whom it waits for, and waits for half an hour. The pulse goes through the store of
torch.distributed, on a connection and in a thread of its own: it beats while the main thread computes, saves or waits.
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

# Seconds that a process has to end by itself after another one said that it failed.
_GRACE = 10.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0  # seconds between two beats
_TIME_TO_LEAVE = 5.0


@dataclass
class RankStatus:
    """What a process says of itself.

    Attributes:
        beat: counts while the process runs, whatever it does.
        moves: counts signs of life of its main thread.
        place: counts what all processes do in the same order, so that who is behind can be told.
        step, phase: where it is, for people.
        ended: whether it has come to its end; ``failure`` then says why, if not well.
    """

    beat: int = 0
    moves: int = 0
    place: int = 0
    step: int = 0
    phase: str = "starting"
    ended: bool = False
    failure: str = ""

    def note(self, phase: str) -> None:
        """A sign of life of one process: what it does now, which the others need not do."""
        self.phase = phase
        self.moves += 1

    def advance(self, phase: str, step: int | None = None) -> None:
        """A sign of life where all processes come by in the same order."""
        self.note(phase)
        self.place += 1
        self.step = self.step if step is None else step


@dataclass
class HangDetector:
    """Finds who keeps the others waiting, from what is heard of all processes.

    Args:
        timeout: seconds without a beat, or without a move while others are further on.
    """

    timeout: float
    # For each process its last pulse, and when its beat and its moves changed for the last time.
    _pulses: list[RankStatus] = field(default_factory=list)
    _beaten: list[float] = field(default_factory=list)
    _moved: list[float] = field(default_factory=list)
    _failed: dict[int, float] = field(default_factory=dict)

    def forget(self) -> None:
        """Begin anew: this process was stopped itself, and has not seen what the others did."""
        self._pulses = []

    def look(self, pulses: Sequence[RankStatus], now: float) -> tuple[int, str] | None:
        """The process that the others wait for, and what is wrong with it; ``None`` while nothing is.

        Who waits in a collective has come as far as anybody and is never meant, nor is who moves, however slowly.
        """
        if not self._pulses:
            self._pulses = list(pulses)
            self._beaten, self._moved = [now] * len(pulses), [now] * len(pulses)
        for rank, (old, new) in enumerate(zip(self._pulses, pulses, strict=True)):
            if new.beat != old.beat or new.ended:
                self._beaten[rank] = now
            if new.moves != old.moves or new.ended:
                self._moved[rank] = now
            if new.failure and now - self._failed.setdefault(rank, now) > min(_GRACE, self.timeout):
                return rank, f"failed: {new.failure}"
        self._pulses = list(pulses)
        for rank, pulse in enumerate(pulses):
            if (seconds := now - self._beaten[rank]) > self.timeout:
                return rank, f"has been silent for {seconds:.0f} s; {_last_seen(pulse)}"
        furthest = max(pulse.place for pulse in pulses)
        for rank, pulse in enumerate(pulses):
            seconds = now - self._moved[rank]
            # Before the first step a process may load for longer than others. One that may be silent is given its time.
            is_behind = 0 < pulse.place < furthest and now - self._beaten[rank] < self.timeout / 2
            if is_behind and seconds > self.timeout:
                return rank, f"has not moved for {seconds:.0f} s, and the others wait for it; {_last_seen(pulse)}"
        return None


def _last_seen(pulse: RankStatus) -> str:
    return f"it was last seen at step {pulse.step}, {pulse.phase}"


class Heartbeat:
    """The pulse of this process, and the watch over the others where there are any.

    Args:
        timeout: seconds after which a process is named and this one ends; 0 watches nothing.

    Attributes:
        pulse: what this process says of itself; to be noted by the main thread.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self.pulse = RankStatus()
        self._world, self._timeout = world, timeout
        self._pause = max(_SHORTEST_PAUSE, min(timeout / 10, _LONGEST_PAUSE))
        self._heard: tuple[float, list[RankStatus]] = (time.monotonic(), [])
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []
        if world.size == 1 or not timeout:
            return
        self._keys = [str(rank) for rank in range(world.size)]
        self._store = _connect(timeout, world.name)
        self._say()
        world.wait("heartbeat")  # from now on every process has said something
        for work in (self._speak, self._watch):
            self._threads.append(threading.Thread(target=work, name=f"heartbeat{work.__name__}", daemon=True))
            self._threads[-1].start()

    def report_failure(self, message: str) -> None:
        """Tell the others, wherever they wait, that this process fails; no message where all of them do."""
        self.stop(message)
        if message:
            self._world.report_failure(message)
            return
        with contextlib.suppress(RunError):  # one of them has not come so far
            self._world.leave()  # the first process has to stay until all have heard what it said

    def leave(self) -> None:
        """End together, when all went well. The first process, which the others talk through, goes last."""
        if not self._world.is_first:
            self.stop()
        self._world.leave()
        self.stop()

    def stop(self, failure: str = "") -> None:
        """Say that this process has come to its end, and no more."""
        self.pulse.failure, self.pulse.ended = failure, True
        self._end.set()
        for thread in self._threads:
            thread.join(_TIME_TO_LEAVE)

    def _say(self) -> None:
        self._store.set(self._keys[self._world.rank], json.dumps(asdict(self.pulse)))

    def _speak(self) -> None:
        """Say this process's pulse and hear the others'. May wait for ever in a call, so another thread judges."""
        while not self._end.is_set():
            self.pulse.beat += 1
            try:
                self._say()
                pulses = [RankStatus(**json.loads(text)) for text in self._store.multi_get(self._keys)]
                self._heard = (time.monotonic(), pulses)
            except RuntimeError:  # the time since this process has heard something tells
                with contextlib.suppress(RuntimeError):
                    self._store = _connect(self._timeout, self._world.name)
            self._end.wait(self._pause)
        with contextlib.suppress(RuntimeError):  # nobody is left to hear it
            self._say()

    def _watch(self) -> None:
        judge, last = HangDetector(self._timeout), time.monotonic()
        while not self._end.wait(self._pause):
            now = time.monotonic()
            if now - last > max(1.0, 3 * self._pause):  # this process itself was stopped
                judge.forget()
                self._heard = (now, [])
            last, (heard, pulses) = now, self._heard
            if now - heard > self._timeout:
                self._give_up(
                    f"nothing has been heard of the other processes for {now - heard:.0f} s: "
                    f"{self._world.describe(0)}, through which they talk at {describe_master()}, cannot be reached. "
                    "Its host is gone, or the network is"
                )
            verdict = judge.look(pulses, now) if pulses else None
            if verdict is not None:
                self._give_up(f"{self._world.describe(verdict[0])} {verdict[1]}")

    def _give_up(self, message: str) -> None:
        if not self._end.is_set():
            abort_from_thread(message)


def _connect(timeout: float, name: str) -> Any:
    """The store of this run's processes, on a connection that no other call of this process can block."""
    store = TCPStore(*master_address(), is_master=False, timeout=timedelta(seconds=timeout))
    return PrefixStore(f"{name}/heartbeat", store)


def join_run(timeout: float) -> tuple[World, Heartbeat]:
    """The processes of a run and their watch; when this one fails, the others are told from now on."""
    world = join_world()
    heartbeat = Heartbeat(world, timeout)
    notify_on_failure(world.describe(world.rank), heartbeat.report_failure)
    return world, heartbeat


class HeartbeatCallback(TrainerCallback):
    """Notes how far the training is."""

    def __init__(self, pulse: RankStatus) -> None:
        self.pulse = pulse

    def _advance(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.pulse.advance("while saving" if control.should_save else "while training", state.global_step)

    on_train_begin = on_step_begin = on_substep_end = on_step_end = on_evaluate = on_save = on_train_end = _advance

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pulse.advance("while evaluating", state.global_step)
