"""Every ``--lr_scheduler_type``: which ``--lr_scheduler_kwargs`` it takes, and what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from checkpoints.json_rules import BOOLEAN, Rule, number, one_of, whole


@dataclass(frozen=True)
class Schedule:
    """Arguments of a schedule.

    Attributes:
        arguments: its ``--lr_scheduler_kwargs``.
        one_of: of these arguments exactly one has to be given.
        needs_evaluations: it follows the loss of evaluations.
        warms_up: it begins with ``--warmup_steps``.
    """

    arguments: Mapping[str, Rule] = field(default_factory=dict)
    one_of: tuple[str, ...] = ()
    needs_evaluations: bool = False
    warms_up: bool = True


_POSITIVE, _RATE, _SHARE = number(1e-9, 1e9), number(0, 1e9), number(0, 1)
_COUNT, _ABOVE_0 = whole(0, 10**9), whole(1, 10**9)
_MINIMUM = {"min_lr": _RATE, "min_lr_rate": _SHARE, "num_cycles": _POSITIVE}
_SHAPES = one_of("linear", "cosine", "1-sqrt")
_ON_EVALUATIONS = {
    "mode": one_of("min", "max"), "factor": number(1e-9, 0.999999), "patience": _COUNT, "threshold": _RATE,
    "threshold_mode": one_of("rel", "abs"), "cooldown": _COUNT, "min_lr": _RATE, "eps": _RATE,
}  # fmt: skip

SCHEDULES: dict[str, Schedule] = {
    "linear": Schedule(),
    "cosine": Schedule({"num_cycles": _POSITIVE}),
    "cosine_with_restarts": Schedule({"num_cycles": _ABOVE_0}),
    "polynomial": Schedule({"lr_end": _RATE, "power": _POSITIVE}),
    "constant": Schedule(warms_up=False),
    "constant_with_warmup": Schedule(),
    "inverse_sqrt": Schedule({"timescale": _ABOVE_0}),
    "reduce_lr_on_plateau": Schedule(_ON_EVALUATIONS, needs_evaluations=True, warms_up=False),
    "cosine_with_min_lr": Schedule(_MINIMUM, one_of=("min_lr", "min_lr_rate")),
    "cosine_warmup_with_min_lr": Schedule(
        {**_MINIMUM, "warmup_lr_rate": _SHARE}, one_of=("min_lr", "min_lr_rate")
    ),
    "warmup_stable_decay": Schedule(
        {
            "num_decay_steps": _COUNT, "num_stable_steps": _COUNT, "warmup_type": _SHAPES, "decay_type": _SHAPES,
            "min_lr_ratio": _SHARE, "num_cycles": _POSITIVE,
        },
        one_of=("num_decay_steps",),
    ),
    "greedy": Schedule(
        {
            **_ON_EVALUATIONS, "warmup": _COUNT, "max_lr": _POSITIVE, "smooth": BOOLEAN, "verbose": BOOLEAN,
            "window_size": _ABOVE_0, "reset_start": _COUNT,
        },
        needs_evaluations=True,
        warms_up=False,
    ),
}  # fmt: skip
