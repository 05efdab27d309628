"""Default intervals, in optimizer steps, of logging and evaluation."""

from __future__ import annotations

LOGGING_STEPS = 10
# Of runs up to this length each step is logged.
SHORT_RUN = 100
# Independent of the default above: an evaluation takes longer than a log line.
EVAL_STEPS = 500


def evaluation_steps(eval_steps: float | None, logging_steps: float | None) -> float:
    """Return the interval of evaluations; transformers, too, falls back on a given ``--logging_steps``."""
    return eval_steps or logging_steps or EVAL_STEPS
