"""The gated delta rule of Qwen3.5's linear attention, computed in chunks, with its own gradient.

A head has a state S [D, E], from which a token with query q, key k, value v, log decay g <= 0 and strength b reads and
to which it writes (Yang et al., Gated Delta Networks, 2024):

    S <- exp(g) S;  S <- S + k (b (v - k^T S))^T;  output = q^T S

Within a chunk, with G the sums of g from its start, k_i and v_i the rows of K and V, and S the state before the chunk,
the values u_i = b_i (v_i - k_i^T S_i) that its tokens write solve a triangular system:

    (I + A) U = b (V - exp(G) K S),  A_ij = b_i (k_i . k_j) exp(G_i - G_j)  for j < i

Everything but the states is computed for all chunks of all samples at once; the states of the samples that have an
n-th chunk in one product. The backward pass keeps the inputs and the states, and computes the rest again: autograd
would keep a dozen tensors of the size of the values.

Shapes: N tokens, S samples, M chunks, C tokens of a chunk, K heads of queries and keys, R heads of values for each of
them, D size of a key, E size of a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 64
_EPSILON = 1e-6  # of the norms of queries and keys, as flash-linear-attention has it


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Compute the gated delta rule of each sample, from a state of zeros; in float32 or wider.

    Args:
        query, key: [N, K, D], not normalised.
        value: [N, K * R, E].
        log_decay, strength: [N, K * R]; the former is not positive, the latter in (0, 1).
        lengths: of the samples, one after the other; their sum is N.

    Returns:
        [N, K * R, E], in the dtype of ``value``.
    """
    output: Tensor = _DeltaRule.apply(query, key, value, log_decay, strength, tuple(lengths))
    return output


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            plan = _Plan(lengths, query.device)
            chunks = _Chunks(plan, query, key, value, log_decay, strength)
            output, states = chunks.run()
        ctx.save_for_backward(query, key, value, log_decay, strength, states)
        ctx.lengths = lengths
        return plan.to_tokens(output.permute(0, 3, 1, 2, 4)).view_as(value).to(value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, log_decay, strength, states = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            plan = _Plan(ctx.lengths, query.device)
            chunks = _Chunks(plan, query, key, value, log_decay, strength)
            gradients = chunks.gradients(gradient, states)
        inputs = (query, key, value, log_decay, strength)
        return *(each.view_as(of).to(of.dtype) for each, of in zip(gradients, inputs, strict=True)), None


class _Plan:
    """Where the chunks of all samples are: those of the samples' first chunks, then those of the second ones...

    Longer samples come first, so that the samples which have an n-th chunk are the first ones that have the one before.

    Attributes:
        steps: for each n the slice of the n-th chunks.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        ends = list(accumulate(lengths))
        longest_first = sorted(zip(ends, lengths, strict=True), key=lambda sample: -sample[1] // CHUNK)
        chunks: list[tuple[int, int]] = []
        self.steps: list[slice] = []
        for offset in range(0, max(lengths), CHUNK):
            some = [(end - length + offset, end) for end, length in longest_first if length > offset]
            self.steps.append(slice(len(chunks), len(chunks) + len(some)))
            chunks += some
        first, end = torch.tensor(chunks, device=device).unsqueeze(2).unbind(1)
        tokens = first + torch.arange(CHUNK, device=device)
        self.is_padding = tokens >= end  # [M, C]
        self._tokens = tokens.clamp(max=ends[-1] - 1).flatten()
        places = torch.empty(ends[-1] + 1, dtype=torch.long, device=device)
        targets = tokens.masked_fill(self.is_padding, ends[-1]).flatten()
        self._places = places.scatter_(0, targets, torch.arange(len(targets), device=device))[:-1]

    def to_chunks(self, values: Tensor) -> Tensor:
        """Bring values [N, ...] into chunks, [M, C, ...]; there is any token's value at the padding."""
        return values.index_select(0, self._tokens).unflatten(0, (-1, CHUNK))

    def to_tokens(self, values: Tensor) -> Tensor:
        """Bring values in chunks [M, C, ...] back into the order of the tokens, [N, ...]."""
        return values.flatten(0, 1).index_select(0, self._places)


class _Chunks:
    """The chunks of all samples. Tokens of the padding write nothing: their strength is 0.

    Attributes:
        query, key: normalised, [M, K, C, D]; the query is divided by the square root of D.
        value: [M, K, R, C, E].
        strength, decay: b and exp(G), [M, K, R, C, 1].
        rest: decay from a token to the end of its chunk, [M, K, R, C, 1].
        between: decay from a token to a later one, zero for the others, [M, K, R, C, C].
        reads: (q_i . k_j) times ``between``, [M, K, R, C, C].
        inverse: (I + A)^-1.
    """

    def __init__(
        self, plan: _Plan, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor
    ) -> None:
        self.plan = plan
        self.heads = query.shape[1]
        dtype = torch.promote_types(query.dtype, torch.float32)
        self.query, self.query_norm = _normalised(plan.to_chunks(query).transpose(1, 2).to(dtype))
        self.key, self.key_norm = _normalised(plan.to_chunks(key).transpose(1, 2).to(dtype))
        self.scale = query.shape[-1] ** -0.5
        self.query *= self.scale
        self.value = self._by_head(value).to(dtype)
        padding = plan.is_padding[:, None, None]
        self.strength = self._by_head(strength.unsqueeze(-1)).to(dtype).masked_fill(padding.unsqueeze(-1), 0)
        sums = self._by_head(log_decay.unsqueeze(-1))[..., 0].to(dtype).masked_fill(padding, 0).cumsum(-1)
        self.decay = sums.exp().unsqueeze(-1)
        self.rest = (sums[..., -1:] - sums).exp().unsqueeze(-1)
        self.between = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).tril_().exp_().tril_()
        self.key_products = (self.key @ self.key.mT).unsqueeze(2)
        self.reads = (self.query @ self.key.mT).unsqueeze(2) * self.between
        self.writes = (self.key_products * self.between).mul_(self.strength).tril_(-1)
        self.inverse = _inverse(self.writes)

    def _by_head(self, values: Tensor) -> Tensor:
        """Bring values [N, K * R, ...] into [M, K, R, C, ...]."""
        chunks = self.plan.to_chunks(values).unflatten(2, (self.heads, -1))
        return chunks.permute(0, 2, 3, 1, *range(4, chunks.dim()))

    def run(self) -> tuple[Tensor, Tensor]:
        """Return the outputs [M, K, R, C, E] and the states [M, K, D, R * E] before each chunk."""
        chunks, heads, shared, _, size = self.value.shape
        states = self.value.new_zeros(chunks, heads, self.key.shape[-1], shared * size)
        written = torch.empty_like(self.value, memory_format=torch.contiguous_format)
        right = self.value * self.strength
        factor = self.decay * self.strength
        for now, after in _with_next(self.plan.steps):
            read = self._split(self.key[now] @ states[now])
            written[now] = self.inverse[now] @ (right[now] - read * factor[now])
            if after is not None:
                going = slice(now.start, now.start + after.stop - after.start)
                torch.matmul(self.key[going].mT, _joined(written[going] * self.rest[going]), out=states[after])
                states[after] += states[going] * self._of_state(self.decay[going, :, :, -1:])
        output = self._split(self.query @ states) * self.decay
        output += self.reads @ written
        return output, states

    def gradients(self, gradient: Tensor, states: Tensor) -> Iterator[Tensor]:
        """Return the gradients of query, key, value, log decay and strength in the order of the tokens.

        Args:
            gradient: [N, K * R, E], of the outputs.
            states: those that ``run`` has returned.
        """
        to_output = self._by_head(gradient).to(self.value.dtype)
        to_output = to_output.masked_fill(self.plan.is_padding[:, None, None, :, None], 0)
        missing = self.value - self._split(self.key @ states) * self.decay
        written = self.inverse @ (missing * self.strength)
        to_right, to_states, to_kept = self._scan_back(to_output, states)
        # What is written solves (I + A) written = right, so A's gradient is minus that of right times what is written.
        to_writes = (to_right @ written.mT).neg_().tril_(-1)
        to_reads = to_output @ written.mT  # ``between`` is zero above the diagonal
        to_strength = (to_right * missing).sum(-1) + (to_writes * self.key_products).mul_(self.between).sum(-1)
        to_value = to_right * self.strength
        products = (to_writes * self.writes).addcmul_(to_reads, self.reads)
        to_sums = products.sum(-1) - products.sum(-2)
        # The three uses of a state: read by keys, read by queries, and what is kept and written of it.
        to_key_read = to_right * (self.strength * self.decay)
        to_sums += ((missing - self.value) * to_value).sum(-1)
        to_query_read = to_output * self.decay
        to_sums += (to_query_read * self._split(self.query @ states)).sum(-1)
        kept = written * self.rest
        of_rest = (to_kept * kept).sum(-1)
        to_sums -= of_rest
        ends = (states * to_states).unflatten(-1, (self.value.shape[2], -1)).sum((2, 4)) * self.decay[..., -1, 0]
        to_sums[..., -1] += of_rest.sum(-1) + ends
        of_products = to_writes.mul_(self.strength).mul_(self.between).sum(2)
        of_reads = to_reads.mul_(self.between).sum(2)
        to_query = _joined(to_query_read) @ states.mT + of_reads @ self.key
        to_key = of_reads.mT @ self.query + (of_products + of_products.mT) @ self.key
        to_key += _joined(kept) @ to_states.mT
        to_key -= _joined(to_key_read) @ states.mT
        to_query = _to_normalised(to_query * self.scale, self.query / self.scale, self.query_norm)
        to_key = _to_normalised(to_key, self.key, self.key_norm)
        to_log_decay = to_sums.flip(-1).cumsum(-1).flip(-1)
        yield from (self.plan.to_tokens(each.transpose(1, 2)) for each in (to_query, to_key))
        yield self.plan.to_tokens(to_value.permute(0, 3, 1, 2, 4))
        yield from (self.plan.to_tokens(each.permute(0, 3, 1, 2)) for each in (to_log_decay, to_strength))

    def _scan_back(self, to_output: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of the right sides, of the states after the chunks, and of what is added to these.

        Returns:
            [M, K, R, C, E], [M, K, D, R * E] and [M, K, R, C, E].
        """
        to_written = self.reads.mT @ to_output
        to_states, of_query = torch.zeros_like(states), self.query.mT @ _joined(to_output * self.decay)
        to_right, to_kept = torch.empty_like(to_written), torch.empty_like(to_written)
        factor = self.decay * self.strength
        for now, before in _with_next(self.plan.steps[::-1]):
            to_kept[now] = self._split(self.key[now] @ to_states[now])
            to_right[now] = self.inverse[now].mT @ (to_written[now] + to_kept[now] * self.rest[now])
            if before is not None:
                going = slice(before.start, before.start + now.stop - now.start)
                read = self.key[now].mT @ _joined(to_right[now] * factor[now])
                kept = to_states[now] * self._of_state(self.decay[now, :, :, -1:])
                torch.sub(kept.add_(of_query[now]), read, out=to_states[going])
        return to_right, to_states, to_kept

    def _split(self, values: Tensor) -> Tensor:
        """Bring [..., K, C, R * E] into [..., K, R, C, E]."""
        return values.unflatten(-1, (self.value.shape[2], -1)).transpose(-3, -2)

    def _of_state(self, values: Tensor) -> Tensor:
        """Repeat a value for each head, [..., K, R, 1, 1], for the columns of its state, [..., K, 1, R * E]."""
        return _joined(values.expand(*values.shape[:-1], self.value.shape[-1]))


def _joined(values: Tensor) -> Tensor:
    """Bring [..., K, R, C, E] into [..., K, C, R * E]."""
    return values.transpose(-3, -2).flatten(-2)


def _with_next(steps: Sequence[slice]) -> Iterator[tuple[slice, slice | None]]:
    return zip(steps, [*steps[1:], None], strict=True)


def _normalised(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors of length 1, contiguous, and the reciprocals of their lengths."""
    inverse = vectors.square().sum(-1, keepdim=True).add_(_EPSILON).rsqrt_()
    return (vectors * inverse).contiguous(), inverse


def _to_normalised(gradient: Tensor, normalised: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient of vectors from that of the normalised ones."""
    along = (gradient * normalised).sum(-1, keepdim=True)
    return (gradient - normalised * along) * inverse


def _inverse(lower: Tensor) -> Tensor:
    """Return the inverse of I + ``lower``, of which only what is below the diagonal is not zero."""
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False, unitriangular=True)
