"""Which rows are computed next: a part of new prompts, then a token for every row that runs.

Used by one thread. A fault in a request ends that request: what failed for several rows together is computed again for
each alone, and only those that fail again end with the error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import Tensor

from errors import one_line
from serving.adapters import Group
from serving.batch import Batch, Runner
from serving.row import Row
from serving.sampling import choose_tokens

logger = logging.getLogger(__name__)

# Tokens of prompts that are computed at once: while answers run, they wait for so many.
PROMPT_TOKENS_BESIDE_ANSWERS = 512
PROMPT_TOKENS_ALONE = 4096
_MOST_FAILURES = 3


class Scheduler:
    """The rows of an engine.

    Args:
        places: rows that are answered at the same time.

    Attributes:
        answered: rows that have ended.
        tokens: of prompts and of answers that were computed.
    """

    def __init__(self, runner: Runner, places: int) -> None:
        self._runner, self._places = runner, places
        self._prompts: Batch | None = None
        self._batches: dict[Group, Batch] = {}
        self.answered = 0
        self.tokens = (0, 0)

    @property
    def running(self) -> int:
        """Return the number of places that are taken."""
        return sum(len(batch.rows) for batch in self._all_batches())

    @property
    def free(self) -> int:
        return self._places - self.running

    @property
    def wants_rows(self) -> bool:
        """Return whether new rows can begin."""
        return self._prompts is None and self.free > 0

    def choose(self, waiting: Sequence[Row]) -> list[Row]:
        """Return the rows to begin with: the first one, and those of similar length that fit beside it."""
        first, *others = waiting[: self.free]
        if first.failures:
            return [first]
        group, limit = self._group_of(first), self._prompt_tokens()
        others = [row for row in others if not row.failures and self._group_of(row) == group]
        chosen, longest = [first], len(first.ids)
        for row in sorted(others, key=lambda row: abs(len(row.ids) - len(first.ids))):
            longest = max(longest, len(row.ids))
            if longest * (len(chosen) + 1) > limit:
                break
            chosen.append(row)
        return chosen

    def begin(self, rows: Sequence[Row]) -> None:
        """Begin to compute the prompts of rows; ``wants_rows`` must be true."""
        try:
            self._prompts = Batch(self._runner, self._group_of(rows[0]), rows)
        except Exception as error:
            for row in rows:
                self._fail(row, error)
        self.tokens = (self.tokens[0] + sum(len(row.ids) for row in rows), self.tokens[1])

    def end_overdue(self) -> None:
        """End the rows whose clients have left, or whose time is over."""
        for batch in self._all_batches():
            self._end_some(batch)

    def end_all(self) -> None:
        """End all rows as they are."""
        for batch in self._all_batches():
            for row in batch.rows:
                row.ticket.cancel()
        self.end_overdue()

    def fail_all(self, error: Exception) -> None:
        """End all rows with an error."""
        for batch in self._all_batches():
            for row in batch.rows:
                self._fail(row, error)
            self.answered += len(batch.rows)
        self._prompts, self._batches = None, {}

    def turn(self) -> list[Row]:
        """Compute a part of the new prompts and a token for each running row; return rows that must begin again."""
        failed: list[Row] = []
        if (prompts := self._prompts) is not None:
            beside = self._prompt_tokens()
            failed += self._guarded(prompts, lambda: prompts.advance(beside))
            if not prompts.is_prefill or not prompts.rows:
                self._prompts = None
                failed += self._add(prompts)
        running = [batch for batch in self._batches.values() if batch is not prompts]
        for batch in running:
            failed += self._guarded(batch, batch.step)
        self._batches = {group: batch for group, batch in self._batches.items() if batch.rows}
        return failed

    def _all_batches(self) -> list[Batch]:
        return [*([self._prompts] if self._prompts is not None else []), *self._batches.values()]

    def _group_of(self, row: Row) -> Group:
        return self._runner.adapters.group_of(row.adapter)

    def _prompt_tokens(self) -> int:
        return PROMPT_TOKENS_BESIDE_ANSWERS if self._batches else PROMPT_TOKENS_ALONE

    def _end_some(self, batch: Batch) -> None:
        going = []
        for row in batch.rows:
            reason = row.overdue()
            if reason is None:
                going.append(row)
            else:
                row.end(reason)
        self.answered += len(batch.rows) - len(going)
        batch.keep(going)
        if not batch.rows:
            self._batches = {group: each for group, each in self._batches.items() if each is not batch}
            self._prompts = None if self._prompts is batch else self._prompts

    def _guarded(self, batch: Batch, compute: Callable[[], Tensor | None]) -> list[Row]:
        """Compute the next tokens of a batch and hand them to its rows; return rows that must begin again."""
        try:
            scores = compute()
            if scores is not None:
                self._hand_out(batch, scores)
        except Exception as error:
            return self._give_up(batch, error)
        return []

    def _hand_out(self, batch: Batch, scores: Tensor) -> None:
        choices = choose_tokens(scores, [row.sampler for row in batch.rows])
        self.tokens = (self.tokens[0], self.tokens[1] + len(choices))
        going = []
        for row, choice in zip(batch.rows, choices, strict=True):
            try:
                if row.accept(choice):
                    going.append(row)
            except Exception as error:
                self._fail(row, error)
        self.answered += len(batch.rows) - len(going)
        batch.keep(going)

    def _add(self, prompts: Batch) -> list[Row]:
        """Let rows whose prompts are computed run; return rows that must begin again."""
        running = self._batches.get(prompts.group)
        if not prompts.rows:
            return []
        if running is None or not running.rows:
            self._batches[prompts.group] = prompts
            return []
        try:
            running.join(prompts)
        except Exception as error:
            return [*self._give_up(running, error), *self._give_up(prompts, error)]
        return []

    def _give_up(self, batch: Batch, error: Exception) -> list[Row]:
        """Empty a batch whose cache is not known any more, and return its rows, to be computed alone.

        A row that was alone, or has failed too often, ends with the error.
        """
        rows, batch.rows = batch.rows, []
        again = []
        for row in rows:
            row.failures += 1
            if len(rows) > 1 and row.failures <= _MOST_FAILURES:
                again.append(row)
            else:
                self._fail(row, error)
        self.answered += len(rows) - len(again)
        if again:
            logger.warning("%d answers failed together (%s), and go on one by one", len(again), one_line(error))
        return again

    def _fail(self, row: Row, error: Exception) -> None:
        logger.error("an answer failed: %s: %s", type(error).__name__, one_line(error))
        row.ticket.fail(error)
