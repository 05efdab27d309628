"""Signals while a run trains: they take effect after the step, on all ranks alike."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from errors import Terminated
from training import signals as module
from training.signals import Signals, StopRequest

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore pytest's handlers after each test."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs the handler between two instructions


@pytest.mark.parametrize(
    ("number", "requested", "error"),
    [
        (signal.SIGTERM, StopRequest.TERMINATE, Terminated),
        (signal.SIGHUP, StopRequest.TERMINATE, Terminated),
        (signal.SIGINT, StopRequest.INTERRUPT, KeyboardInterrupt),
    ],
)
def test_a_stop_takes_effect_after_the_step(
    number: signal.Signals, requested: StopRequest, error: type[BaseException]
) -> None:
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)  # not under nohup
    signals, steps = Signals(), 0
    with pytest.raises(error), signals.handling():
        send(number)
        assert signals.requested is requested and signals.agreed is StopRequest.NOTHING
        steps += 1  # the current step is finished
        signals.agree([signals.requested])
        assert signals.agreed is requested
        signals.raise_if_requested()
        steps += 1
    assert steps == 1
    # A repeated signal does not interrupt the shutdown.
    send(number)


def test_nohup_has_the_end_of_the_terminal_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = Signals()
    with signals.handling():
        send(signal.SIGHUP)
        assert signals.requested is StopRequest.NOTHING


def test_a_stop_is_recorded_although_stderr_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("os.write", fail)
    monkeypatch.setattr(module.logger, "isEnabledFor", lambda level: True)
    signals = Signals()
    with pytest.raises(Terminated), signals.handling():
        send(signal.SIGTERM)
        assert signals.requested is StopRequest.TERMINATE


def test_a_request_to_save_does_not_stop_the_run() -> None:
    signals, before = Signals(), signal.getsignal(signal.SIGUSR1)
    with signals.handling():
        send(signal.SIGUSR1)
        signals.agree([signals.requested])
        assert signals.agreed is StopRequest.SAVE
        signals.raise_if_requested()
        assert signals.agreed is StopRequest.NOTHING
        signals.agree([signals.requested])
        assert signals.agreed is StopRequest.NOTHING  # one request, one checkpoint
    assert [signal.getsignal(number) for number in NUMBERS[3:]] == [before]


def test_all_ranks_follow_the_greatest_request() -> None:
    """One rank got the signals; the other gets the request with the gathered values of the step."""
    signalled, other = Signals(), Signals()
    with pytest.raises(Terminated), signalled.handling():
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        requests = [float(other.requested), float(signalled.requested)]
        other.agree(requests)
        with pytest.raises(Terminated):
            other.raise_if_requested()
        signalled.agree(requests)
        signalled.raise_if_requested()


def test_a_request_during_an_agreed_one_is_kept() -> None:
    signals = Signals()
    with pytest.raises(KeyboardInterrupt), signals.handling():
        send(signal.SIGUSR1)
        signals.agree([signals.requested])
        send(signal.SIGINT)
        signals.raise_if_requested()  # the save that was requested first
        signals.agree([signals.requested])
        signals.raise_if_requested()


def test_a_second_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """But not the copy that a launcher sends to a process that has received it already."""
    monkeypatch.setattr(module, "_SAME_KEYPRESS", 0.2)
    signals = Signals()
    with pytest.raises(KeyboardInterrupt), signals.handling():
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert signals.requested is StopRequest.INTERRUPT
        time.sleep(0.3)
        send(signal.SIGINT)
        pytest.fail("the second one had no effect")


def test_a_signal_after_the_last_step_ends_the_run() -> None:
    with pytest.raises(Terminated), Signals().handling():
        send(signal.SIGTERM)


def test_former_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with Signals().handling():
        assert [signal.getsignal(number) for number in NUMBERS] != before
    assert [signal.getsignal(number) for number in NUMBERS] == before
    with pytest.raises(ValueError, match="a failure of the run"), Signals().handling():
        raise ValueError("a failure of the run")
    assert [signal.getsignal(number) for number in NUMBERS] == before
