"""The training loss of a causal language model from hidden states, without the logits of all positions.

With Qwen's vocabulary the logits of a batch need more memory than the model's activations: 4.6 GiB per float32 copy at
8,192 tokens. The lean loss computes the logits of the trained positions in blocks, and their gradients in the same
pass; the tensors saved for the backward pass have the size of the hidden states.

Shapes: B batch, T tokens, N trained positions, C hidden size, V vocabulary rows, R rank of an adapter on the head,
K trained rows of a frozen head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from chat.label_mask import IGNORE_INDEX
from qwen_model.head import Head, call_within, head_of, parts_of
from qwen_model.products import product
from qwen_model.summed_gradients import gradient_of, is_summed_in_place

LOGITS_CHUNK_BYTES = 128 * 2**20
"""Most bytes of the float32 logits of one chunk, which a trained head needs at once."""

_BLOCK_BYTES = {"cpu": 32 * 2**20}
"""Most bytes of the logits that are computed at a time, by device: on a CPU they stay in its cache."""

_MOST_POSITIONS = 4096  # of a chunk, if the head is not trained
_CACHED = 4096  # rows of the head's gradient per product, which then takes a third less time
_ALIGNED = 128  # blocks have a multiple of this many columns
_LOWEST, _HIDDEN = torch.finfo(torch.float32).min, -1e30


@dataclass
class CausalLMLossOutput(CausalLMOutputWithPast):
    """transformers' output with ``num_correct``, the number of targets predicted as most likely token (int64)."""

    num_correct: Tensor | None = None


# dynamo cannot trace the exchanged forward methods; the blocks before it are compiled.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def lean_causal_lm_loss(
    hidden_states: Tensor,
    lm_head: torch.nn.Module,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    loss_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    num_targets: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``causal_lm_loss`` from hidden states.

    Args:
        hidden_states: [B, T, C], the head's input.
        lm_head: a linear layer, possibly with peft's wrappers (see ``head.head_of``).
        labels: [B, T], an id or -100; the first of a row is never a target.
        num_items_in_batch: divisor of the summed loss; ``None``: the sum of the weights of this batch's targets.
        loss_weights: [B, T], weight of each label's cross entropy; ``None``: 1.
        label_smoothing: share of the target that is spread over the vocabulary (Szegedy et al. 2016, section 7).
        num_targets: number of targets in ``labels``, if the caller knows it: counting them synchronises a GPU.

    Returns:
        The loss (float32, once differentiable) and the number of targets predicted as most likely token (int64).
    """
    # Labels shifted to the left, so that a position and its target have the same index.
    shifted = F.pad(labels.to(hidden_states.device)[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    is_target = shifted != IGNORE_INDEX
    if num_targets is None:
        positions = is_target.nonzero()[:, 0]
    else:
        positions = torch.nonzero_static(is_target, size=num_targets)[:, 0]
    hidden = hidden_states.flatten(0, 1)[positions]
    targets = shifted[positions]
    weights = torch.ones(targets.shape, device=hidden.device)
    if loss_weights is not None:
        weights = F.pad(loss_weights.to(hidden.device)[:, 1:], (0, 1)).flatten()[positions].float()
    count: Tensor | int = weights.sum() if num_items_in_batch is None else num_items_in_batch
    weights = weights / torch.as_tensor(count, device=hidden.device).clamp(min=torch.finfo(torch.float32).tiny)

    def compute(hidden: Tensor) -> Any:
        head = head_of(lm_head)
        to_weight = gradient_of(head.weight) if is_summed_in_place(head.weight) else None
        return _LeanCrossEntropy.apply(
            hidden, head.weight, head.bias, head.row_values, head.adapter_input(hidden), head.adapter_output,
            head.row_ids, targets, weights, label_smoothing, to_weight,
        )  # fmt: skip

    loss, correct = call_within(parts_of(lm_head), compute, hidden)
    return loss, correct


class _LeanCrossEntropy(torch.autograd.Function):
    """Weighted sum of the cross entropies of N positions; the forward pass computes the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_values: Tensor | None,
        adapter_input: Tensor | None,
        adapter_output: Tensor | None,
        row_ids: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        label_smoothing: float,
        to_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
        with torch.autocast(device.type, enabled=False):
            head = Head(weight, bias, row_ids, row_values, None, adapter_output)
            blocks = _Blocks(head, hidden, adapter_input, dtype, ctx.needs_input_grad[:6], label_smoothing, to_weight)
            loss, correct = blocks.run(targets, weights)
        ctx.gradients, ctx.has_added = blocks.gradients, to_weight is not None
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the lean loss cannot be differentiated a second time: its gradients are released")
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.has_added:
            torch._assert_async(grad_loss == 1, "the head's gradient has been added already, without this factor")
        # In place, because the head's gradient may be the largest tensor of the step.
        return (
            *(None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients),
            None,
            None,
            None,
            None,
            None,
        )


@dataclass
class _Columns:
    """Some columns of the logits: a block of the vocabulary, or the trained rows of a frozen head.

    Attributes:
        weight: [W, C], in the precision of the products.
        bias: [W].
        adapter_output: [W, R], in the precision of the products.
        start: id of a block's first column; ``None``: the trained rows.
        to_weight, to_bias, to_adapter_output: gradients of these columns, which are added to; ``None``: not needed.
    """

    weight: Tensor
    bias: Tensor | None
    adapter_output: Tensor | None
    start: int | None
    to_weight: Tensor | None
    to_bias: Tensor | None
    to_adapter_output: Tensor | None

    def logits(self, hidden: Tensor, adapter_input: Tensor | None) -> Tensor:
        """Return the logits [n, W], float32, of hidden states in the precision of the products."""
        logits = product(hidden, self.weight.T).float()
        if adapter_input is not None and self.adapter_output is not None:
            logits += adapter_input @ self.adapter_output.T
        if self.bias is not None:
            logits += self.bias.float()
        return logits

    def add_gradients(self, narrow: Tensor, factor: Tensor, hidden: Tensor, adapter_input: Tensor | None) -> None:
        """Add the products of the columns' gradient, ``narrow`` [n, W] times ``factor`` [n, 1], with the inputs."""
        if self.to_weight is not None:
            _add_product(self.to_weight, narrow, hidden * factor)
        if self.to_bias is not None:
            self.to_bias += (factor.T @ narrow.float())[0]
        if self.to_adapter_output is not None and adapter_input is not None:
            _add_product(self.to_adapter_output, narrow, adapter_input * factor)


class _Blocks:
    """One pass over the logits: chunks of positions, each in blocks of columns.

    The softmax over all columns is that within each block, times a factor per position and block that is known after
    the last block. What is added to the gradients of the inputs is therefore scaled anew with each block (as in flash
    attention), and only a trained head needs all blocks of a chunk at the end.

    Args:
        head: its tensors, of any floating-point dtype.
        hidden: [N, C].
        adapter_input: [N, R], or ``None``.
        dtype: precision of the matrix products; everything else is float32.
        needs_grad: which of hidden, weight, bias, row_values, adapter_input, adapter_output need a gradient.
        to_weight: to which the weight's gradient is added; without it that is one of ``gradients``.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        adapter_input: Tensor | None,
        dtype: torch.dtype,
        needs_grad: tuple[bool, ...],
        label_smoothing: float,
        to_weight: Tensor | None,
    ) -> None:
        self.head, self.dtype, self.epsilon, self.to_weight = head, dtype, label_smoothing, to_weight
        self.hidden, self.adapter_input = hidden, adapter_input
        inputs = (hidden, head.weight, head.bias, head.row_values, adapter_input, head.adapter_output)
        is_direct = to_weight is not None and to_weight.dtype == torch.float32
        needs_grad = (needs_grad[0], needs_grad[1] and not is_direct, *needs_grad[2:])
        self.gradients = [
            torch.zeros_like(tensor, dtype=torch.float32) if needed and tensor is not None else None
            for tensor, needed in zip(inputs, needs_grad, strict=True)
        ]
        self.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        if is_direct:
            self.gradients[1] = to_weight
        self.needs_gradient = any(gradient is not None for gradient in self.gradients)
        self.trains_head = any(self.gradients[index] is not None for index in (1, 2, 3, 5))
        positions, vocabulary = hidden.shape[0], head.weight.shape[0]
        most = max(1, LOGITS_CHUNK_BYTES // (4 * vocabulary)) if self.trains_head else _MOST_POSITIONS
        self.rows = max(1, math.ceil(positions / max(1, math.ceil(positions / most))))  # chunks of about the same size
        most_bytes = min(LOGITS_CHUNK_BYTES, _BLOCK_BYTES.get(hidden.device.type, LOGITS_CHUNK_BYTES))
        width = max(_ALIGNED, most_bytes // (4 * self.rows) // _ALIGNED * _ALIGNED)
        self.columns = list(self._split(width))

    def _split(self, width: int) -> Iterator[_Columns]:
        head, (_, to_weight, to_bias, to_rows, _, to_adapter_output) = self.head, self.gradients
        weight = head.weight.to(self.dtype)
        adapter = None if head.adapter_output is None else head.adapter_output.to(self.dtype)
        for start in range(0, head.weight.shape[0], width):
            bias, output, *gradients = (
                None if each is None else each[start : start + width]
                for each in (head.bias, adapter, to_weight, to_bias, to_adapter_output)
            )
            yield _Columns(weight[start : start + width], bias, output, start, *gradients)
        if head.row_ids is not None and head.row_values is not None:
            bias = None if head.bias is None else head.bias[head.row_ids]
            of_bias = None if to_bias is None else to_bias.new_zeros(len(head.row_ids))
            yield _Columns(head.row_values.to(self.dtype), bias, None, None, to_rows, of_bias, None)

    def run(self, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), device=targets.device)
        correct = torch.zeros((), dtype=torch.long, device=targets.device)
        for start in range(0, targets.shape[0], self.rows):
            span = slice(start, start + self.rows)
            chunk_loss, chunk_correct = _Chunk(self, span, targets[span, None]).run(weights[span, None])
            loss += chunk_loss
            correct += chunk_correct
        if self.gradients[2] is not None and self.head.row_ids is not None and self.columns[-1].to_bias is not None:
            self.gradients[2].index_add_(0, self.head.row_ids, self.columns[-1].to_bias)
        if self.to_weight is not None:
            if (gradient := self.gradients[1]) is not None and gradient is not self.to_weight:
                self.to_weight += gradient
            self.gradients[1] = None
        self.gradients = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(self.gradients, self.dtypes, strict=True)
        ]
        return loss, correct


class _Chunk:
    """Some positions: what is known of their softmax after the columns so far.

    Attributes:
        targets: [n, 1]; ``is_row`` and ``row`` say which of them is which trained row of a frozen head.
        total: logarithm of the summed exponentials, [n, 1].
        largest, best: largest logit and its id, [n, 1] each.
        of_target: logit of the target, [n, 1].
        summed: sum of the logits, [n, 1], for label smoothing.
        to_hidden, to_adapter_input: the softmax times head and ``adapter_output``, [n, C] and [n, R]; views of the
            gradients.
    """

    def __init__(self, blocks: _Blocks, span: slice, targets: Tensor) -> None:
        self.blocks, self.targets = blocks, targets
        self.hidden = blocks.hidden[span].to(blocks.dtype)
        self.adapter_input = None if blocks.adapter_input is None else blocks.adapter_input[span].to(blocks.dtype)
        to_hidden, *_, to_adapter_input, _ = blocks.gradients
        self.to_hidden = None if to_hidden is None else to_hidden[span]
        self.to_adapter_input = None if to_adapter_input is None else to_adapter_input[span]
        self.total = torch.full(targets.shape, _LOWEST, device=targets.device)
        self.largest, self.best = self.total.clone(), torch.full_like(targets, -1)
        self.of_target, self.summed = torch.zeros_like(self.total), torch.zeros_like(self.total)
        row_ids = blocks.head.row_ids
        if row_ids is None:
            self.row, self.is_row = torch.zeros_like(targets), torch.zeros_like(targets, dtype=torch.bool)
        else:
            self.is_row, self.row = (targets == row_ids).float().max(1, keepdim=True)
            self.is_row = self.is_row.bool()

    def run(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted loss and the number of targets predicted; add to all gradients."""
        epsilon, vocabulary = self.blocks.epsilon, self.blocks.head.weight.shape[0]
        kept = [self._pass(columns) for columns in self.blocks.columns]
        losses = self.total - (1 - epsilon) * self.of_target - epsilon * self.summed / vocabulary
        if self.blocks.needs_gradient:
            # Softmax minus smoothed target, at the target: exact also where both are close to 1.
            at_target = (self.of_target - self.total).expm1() + epsilon
            self._finish_inputs(at_target, weights)
            for columns, (narrow, total) in zip(self.blocks.columns, kept, strict=True):
                if narrow is not None:
                    factor = (total - self.total).exp() * weights
                    columns.add_gradients(narrow, factor, self.hidden, self.adapter_input)
            self._finish_head(at_target * weights, weights)
        return (losses * weights).sum(), (self.best == self.targets).sum()

    def _pass(self, columns: _Columns) -> tuple[Tensor | None, Tensor]:
        """Go over some columns; return their softmax without the targets', if it is needed again, and their total."""
        logits = columns.logits(self.hidden, self.adapter_input)
        if columns.start is None:
            place, is_inside = self.row, self.is_row
        else:
            place = self.targets - columns.start
            is_inside = (place >= 0) & (place < logits.shape[1]) & ~self.is_row
            place = place.clamp(0, logits.shape[1] - 1)
        if self.blocks.epsilon:
            self.summed += logits.sum(1, keepdim=True)
        if columns.start is not None and self.blocks.head.row_ids is not None:
            self._hide_rows(logits, self.blocks.head.row_ids - columns.start)
        self.of_target = torch.where(is_inside, logits.gather(1, place), self.of_target)
        largest, index = _find_largest(logits)
        if columns.start is not None:
            ids = index + columns.start
        else:
            assert self.blocks.head.row_ids is not None, "there are trained rows"
            ids = self.blocks.head.row_ids[index]
        self.best = torch.where(largest > self.largest, ids, self.best)
        self.largest = torch.maximum(largest, self.largest)
        softmax = _softmax_in_place(logits, largest)
        total = largest - softmax.gather(1, index).log()
        before, self.total = self.total, torch.logaddexp(self.total, total)
        if not self.blocks.needs_gradient:
            return None, total
        softmax.scatter_(1, place, softmax.gather(1, place).masked_fill(is_inside, 0))
        narrow = softmax.to(self.blocks.dtype)
        factor, decay = (total - self.total).exp(), (before - self.total).exp()
        for summed, output in (
            (self.to_hidden, columns.weight), (self.to_adapter_input, columns.adapter_output)
        ):  # fmt: skip
            if summed is not None:
                summed.mul_(decay)
                if output is not None:
                    summed.add_(product(narrow, output) * factor)
        return (narrow if self.blocks.trains_head else None), total

    def _hide_rows(self, logits: Tensor, places: Tensor) -> None:
        """Take the columns that trained rows replace out of a block; most places are outside of it."""
        is_inside = (places >= 0) & (places < logits.shape[1])
        places = places.clamp(0, logits.shape[1] - 1)
        if self.blocks.epsilon:
            self.summed -= (logits[:, places] * is_inside).sum(1, keepdim=True)
        logits.index_add_(1, places, (is_inside * _HIDDEN).expand(len(logits), -1))

    def _finish_inputs(self, at_target: Tensor, weights: Tensor) -> None:
        """Add the target's part to the gradients of the inputs, and multiply them with the weights."""
        head, targets = self.blocks.head, self.targets[:, 0]
        share = self.blocks.epsilon / head.weight.shape[0]
        for total, rows, trained in (
            (self.to_hidden, head.weight, head.row_values), (self.to_adapter_input, head.adapter_output, None)
        ):  # fmt: skip
            if total is None:
                continue
            if rows is not None:
                of_target = rows[targets].float()
                if head.row_ids is not None:
                    other = torch.zeros_like(of_target) if trained is None else trained[self.row[:, 0]].float()
                    of_target = torch.where(self.is_row, other, of_target)
                total.addcmul_(of_target, at_target)
                if share:
                    summed = rows.sum(0, dtype=torch.float32)
                    if head.row_ids is not None:
                        summed -= rows[head.row_ids].sum(0, dtype=torch.float32)
                        summed += 0 if trained is None else trained.sum(0, dtype=torch.float32)
                    total.sub_(share * summed)
            total.mul_(weights)

    def _finish_head(self, at_target: Tensor, weights: Tensor) -> None:
        """Add the target's part to the gradients of the head.

        Args:
            at_target: [n, 1], weighted.
        """
        _, to_weight, to_bias, to_rows, _, to_adapter_output = self.blocks.gradients
        row_ids, targets = self.blocks.head.row_ids, self.targets[:, 0]
        share = self.blocks.epsilon / self.blocks.head.weight.shape[0]
        for total, inputs in ((to_weight, self.hidden), (to_adapter_output, self.adapter_input)):
            if total is None or inputs is None:
                continue
            total.index_add_(0, targets, inputs.float() * at_target.masked_fill(self.is_row, 0))
            if share:
                everywhere = share * (weights.T @ inputs.float())
                total.sub_(everywhere)
                if row_ids is not None:
                    total.index_add_(0, row_ids, everywhere.expand(len(row_ids), -1))
        if to_bias is not None:
            to_bias.index_add_(0, targets, at_target[:, 0])
            to_bias -= share * weights.sum()
        if to_rows is not None:
            to_rows.index_add_(0, self.row[:, 0], self.hidden.float() * at_target.masked_fill(~self.is_row, 0))
            if share:
                to_rows.sub_(share * (weights.T @ self.hidden.float()))


def _add_product(total: Tensor, narrow: Tensor, inputs: Tensor) -> None:
    """Add ``narrow.T @ inputs`` to a gradient in float32."""
    is_half = narrow.dtype != torch.float32
    inputs = inputs.to(narrow.dtype)
    # In 16 bits the product is a matrix of its own, as large as the rows. Those of a block are few on a CPU, whose
    # library is slow where a matrix has gaps.
    rows = len(total) if is_half and narrow.device.type == "cpu" else _CACHED
    for start in range(0, len(total), rows):
        part, columns = total[start : start + rows], narrow[:, start : start + rows].T
        part.add_(columns @ inputs) if is_half else part.addmm_(columns, inputs)


def _find_largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logit of each row and its first index, [n, 1] each.

    On a CPU ``max`` with indices takes four times as long as without: indices are looked for in one block of the row.
    """
    width = math.gcd(logits.shape[1], 128)
    if width < 16:
        return logits.max(dim=1, keepdim=True)
    blocks = logits.unflatten(1, (-1, width))
    largest, block = blocks.amax(2).max(dim=1, keepdim=True)
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, width)).argmax(2)
    return largest, block * width + within


def _softmax_in_place(logits: Tensor, largest: Tensor) -> Tensor:
    """Replace logits by their softmax: with one kernel on a CPU, which reads a row before it writes it."""
    if logits.device.type == "cpu":
        return torch.softmax(logits, 1, out=logits)
    exponentials = logits.sub_(largest).exp_()
    return exponentials.div_(exponentials.sum(1, keepdim=True))
