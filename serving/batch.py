"""Rows that are computed together: prompts in parts, then a token for each row in a step.

Rows are padded on the left. A row's positions count from its own first token, and it sees neither padding nor other
rows, so its answer is that which it would get alone.

Shapes: B rows, T columns of a call, L columns of the cache and the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_model.rope import ntk_alpha
from serving.adapters import Adapters, Group
from serving.row import Row
from serving.row_cache import build_row_cache, join_caches, keep_rows


class Runner:
    """A model with its adapters, called for the rows of a batch.

    Args:
        model: the base model, whose layers have the adapters.
    """

    def __init__(self, model: Any, adapters: Adapters, kv_cache: str | None = None) -> None:
        self.model, self.adapters, self.config = model, adapters, model.config
        self._kv_cache = kv_cache
        self.new_cache()  # an unknown kind of cache is refused before any request
        self.device = model.get_input_embeddings().weight.device
        has_windows = "sliding_attention" in (getattr(self.config, "layer_types", None) or ())
        self._window: int | None = self.config.sliding_window if has_windows else None
        self._trained_length: int | None = None
        if getattr(self.config, "use_dynamic_ntk", False):
            self._trained_length = self.config.trained_length()

    def new_cache(self) -> Any:
        return build_row_cache(self.config, self._kv_cache)

    def forward(self, rows: Sequence[Row], group: Group, ids: Tensor, padding: Sequence[int], cache: Any) -> Tensor:
        """Compute the scores of each row's next token, [B, V].

        Args:
            ids: [B, T], the columns after those of the cache.
            padding: columns on the left of each row that are no tokens.
        """
        start = int(cache.get_seq_length())
        end = start + ids.shape[1]
        left = torch.tensor(padding, device=self.device)[:, None]
        positions = torch.arange(start, end, device=self.device)
        hides_padding = any(padding)
        inputs: dict[str, Any] = {}
        if self._trained_length is not None:
            lengths = torch.tensor([row.prompt_length for row in rows], device=self.device)
            inputs["ntk_factors"] = ntk_alpha(lengths, self._trained_length)
        self.adapters.use(group, [row.adapter for row in rows])
        output = self.model(
            input_ids=ids.to(self.device),
            position_ids=(positions - left).clamp(min=0),
            attention_mask={
                "full_attention": _mask(start, end, left, hides_padding),
                "sliding_attention": _mask(start, end, left, hides_padding, self._window),
                "linear_attention": positions >= left if max(padding) > start else None,
            },
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def _mask(start: int, end: int, left: Tensor, hides_padding: bool, window: int | None = None) -> Tensor | None:
    """Return what the columns from ``start`` to ``end`` may attend to, [B, 1, T, L].

    Args:
        left: columns of padding of each row, [B, 1].
        hides_padding: whether there are any.
        window: most columns that are seen, the own one included; ``None``: all.

    Returns:
        ``None`` for what attention does without a mask: one column sees all, or all columns those before them.
    """
    hides_old = window is not None and end > window
    if not hides_padding and not hides_old and (end - start == 1 or start == 0):
        return None
    columns = torch.arange(end, device=left.device)
    distance = columns[start:, None] - columns
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    # Padding sees itself: a column that sees nothing has no softmax.
    allowed = (seen & (columns >= left)[:, None, :]) | (distance == 0)
    return allowed[:, None]


class Batch:
    """Rows of one group with their cache.

    Attributes:
        rows: in the order of the cache's rows.
    """

    def __init__(self, runner: Runner, group: Group, rows: Sequence[Row]) -> None:
        """Start the rows with empty caches: ``advance`` computes what they contain."""
        self._runner, self.group, self.rows = runner, group, list(rows)
        self._cache = runner.new_cache()
        self._done = 0
        longest = max(len(row.ids) for row in rows)
        self._padding = [longest - len(row.ids) for row in rows]
        self._ids = torch.tensor([[0] * (longest - len(row.ids)) + row.ids for row in rows])

    def advance(self, tokens: int) -> Tensor | None:
        """Compute the next part of what the rows contain; at its end return the scores [B, V] of their next tokens.

        Args:
            tokens: most tokens that are computed, padding included; one column at least.
        """
        end = min(self._ids.shape[1], self._done + max(1, tokens // len(self.rows)))
        part = self._ids[:, self._done : end]
        scores = self._runner.forward(self.rows, self.group, part, self._padding, self._cache)
        self._done = end
        return scores if end == self._ids.shape[1] else None

    def step(self) -> Tensor:
        """Compute the newest token of each row, and return the scores [B, V] of the next ones."""
        ids = torch.tensor([[row.ids[-1]] for row in self.rows])
        return self._runner.forward(self.rows, self.group, ids, self._padding, self._cache)

    def keep(self, rows: Sequence[Row]) -> None:
        """Keep some of the rows, and remove columns that are padding for all of them."""
        kept = set(map(id, rows))
        indices = [index for index, row in enumerate(self.rows) if id(row) in kept]
        if len(indices) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in indices]
        if not self.rows:
            return
        padding = [self._padding[index] for index in indices]
        # While prompts are computed, only columns of the cache can be cut.
        unused = min([*padding, self._done] if self.is_prefill else padding)
        self._padding = [each - unused for each in padding]
        if self.is_prefill:
            self._ids, self._done = self._ids[indices, unused:], self._done - unused
        if self._cache.get_seq_length():
            keep_rows(self._cache, indices, unused)

    @property
    def is_prefill(self) -> bool:
        """Return whether ``advance`` has more to compute."""
        return self._done < self._ids.shape[1]

    def join(self, other: Batch) -> None:
        """Append the rows of another batch of this group; both caches are complete but for each row's newest token."""
        own, others = self._cache.get_seq_length(), other._cache.get_seq_length()
        length = max(own, others)
        join_caches(self._cache, other._cache, length - own, length - others)
        self._padding = [each + length - own for each in self._padding]
        self._padding += [each + length - others for each in other._padding]
        self.rows += other.rows
        self._ids, self._done = self._ids[:0, :0], 0
