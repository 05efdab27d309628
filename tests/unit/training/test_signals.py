"""What a process makes of signals while it trains, and that several agree."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from errors import Terminated
from training import signals as module
from training.signals import Signals, StopRequest

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """pytest's own come back behind a test."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python sees it between two of its instructions


@pytest.mark.parametrize(
    ("number", "wish", "error"),
    [(signal.SIGTERM, StopRequest.TERMINATE, Terminated), (signal.SIGINT, StopRequest.INTERRUPT, KeyboardInterrupt)],
)
def test_a_signal_to_stop_waits_for_the_step(
    number: signal.Signals, wish: StopRequest, error: type[BaseException]
) -> None:
    signals, steps = Signals(), 0
    with pytest.raises(error), signals.handling():
        send(number)
        assert signals.requested is wish and signals.agreed is StopRequest.NOTHING
        steps += 1  # the step at hand is finished
        signals.agree([signals.requested])
        assert signals.agreed is wish
        signals.raise_if_requested()
        steps += 1
    assert steps == 1
    # What is sent once more does not interrupt what is being ended.
    send(number)


def test_a_request_to_save_lets_the_run_go_on() -> None:
    signals, before = Signals(), signal.getsignal(signal.SIGUSR1)
    with signals.handling():
        send(signal.SIGUSR1)
        signals.agree([signals.requested])
        assert signals.agreed is StopRequest.SAVE
        signals.raise_if_requested()
        assert signals.agreed is StopRequest.NOTHING
        signals.agree([signals.requested])
        assert signals.agreed is StopRequest.NOTHING  # one request, one checkpoint
    assert [signal.getsignal(number) for number in NUMBERS[2:]] == [before]


def test_all_processes_do_what_the_strongest_of_them_was_asked_for() -> None:
    """One got the signal, the others see it in the numbers of the step."""
    asked, other = Signals(), Signals()
    with pytest.raises(Terminated), asked.handling():
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        wishes = [float(other.requested), float(asked.requested)]
        other.agree(wishes)
        with pytest.raises(Terminated):
            other.raise_if_requested()
        asked.agree(wishes)
        asked.raise_if_requested()


def test_a_request_that_comes_while_another_is_agreed_on_is_kept() -> None:
    signals = Signals()
    with pytest.raises(KeyboardInterrupt), signals.handling():
        send(signal.SIGUSR1)
        signals.agree([signals.requested])
        send(signal.SIGINT)
        signals.raise_if_requested()  # the checkpoint that was asked for first
        signals.agree([signals.requested])
        signals.raise_if_requested()


def test_a_second_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """But not the one that a launcher passes on to a process that has it already."""
    monkeypatch.setattr(module, "_SAME_KEYPRESS", 0.2)
    signals = Signals()
    with pytest.raises(KeyboardInterrupt), signals.handling():
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert signals.requested is StopRequest.INTERRUPT
        time.sleep(0.3)
        send(signal.SIGINT)
        pytest.fail("the second one was not heard")


def test_a_signal_behind_the_last_step_ends_the_run() -> None:
    with pytest.raises(Terminated), Signals().handling():
        send(signal.SIGTERM)


def test_elsewhere_signals_do_what_they_did() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with Signals().handling():
        assert [signal.getsignal(number) for number in NUMBERS] != before
    assert [signal.getsignal(number) for number in NUMBERS] == before
    with pytest.raises(ValueError, match="a failure of the run"), Signals().handling():
        raise ValueError("a failure of the run")
    assert [signal.getsignal(number) for number in NUMBERS] == before
