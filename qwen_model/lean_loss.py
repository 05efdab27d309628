"""The training loss of a causal language model from hidden states, without the logits of all positions.

With Qwen's vocabulary the logits of a batch need more memory than the model's activations: 4.6 GiB per float32 copy at
8,192 tokens. The lean loss computes the logits of the trained positions in chunks, and the gradients of each chunk in
the same pass; the tensors saved for the backward pass have the size of the hidden states.

Shapes: B batch, T tokens, N trained positions, C hidden size, V vocabulary rows, R rank of an adapter on the head,
K trained rows of a frozen head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from chat.label_mask import IGNORE_INDEX
from qwen_model.head import Head, call_within, head_of, parts_of
from qwen_model.products import product

LOGITS_CHUNK_BYTES = 128 * 2**20
"""Most bytes of the float32 logits of one chunk. Products of a quarter of the rows take 1.3 times as long per row."""

_BLOCK = 16384  # rows of the head per product of its gradient in half precision


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
        return _LeanCrossEntropy.apply(
            hidden, head.weight, head.bias, head.row_values, head.adapter_input(hidden), head.adapter_output,
            head.row_ids, targets, weights, label_smoothing,
        )  # fmt: skip

    loss, correct = call_within(parts_of(lm_head), compute, hidden)
    return loss, correct


def full_logits_loss(
    logits: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    loss_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute the results of ``lean_causal_lm_loss`` from the logits [B, T, V] of all positions."""
    flat, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device)
    is_target = targets != IGNORE_INDEX
    losses = F.cross_entropy(
        flat, targets, ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=label_smoothing
    )
    weights = is_target.float()
    if loss_weights is not None:
        weights = weights * loss_weights[:, 1:].flatten().to(weights)
    count = weights.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=flat.device)
    loss = (losses * weights).sum() / count.clamp(min=torch.finfo(torch.float32).tiny)
    return loss, ((flat.argmax(-1) == targets) & is_target).sum()


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
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
        with torch.autocast(device.type, enabled=False):
            head = Head(weight, bias, row_ids, row_values, None, adapter_output)
            chunks = _Chunks(head, hidden, adapter_input, dtype, ctx.needs_input_grad[:6], label_smoothing)
            loss, correct = chunks.run(targets, weights)
        ctx.gradients = chunks.gradients
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the lean loss cannot be differentiated a second time: its gradients are released")
        gradients, ctx.gradients = ctx.gradients, None
        # In place, because the head's gradient may be the largest tensor of the step.
        return (
            *(None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients),
            None,
            None,
            None,
            None,
        )


class _Chunks:
    """One forward pass over all chunks, one after the other, which add to the same gradients.

    Args:
        head: its tensors, of any floating-point dtype.
        hidden: [N, C].
        adapter_input: [N, R], or ``None``.
        dtype: precision of the matrix products; everything else is float32.
        needs_grad: which of hidden, weight, bias, row_values, adapter_input, adapter_output need a gradient.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        adapter_input: Tensor | None,
        dtype: torch.dtype,
        needs_grad: tuple[bool, ...],
        label_smoothing: float,
    ) -> None:
        self.head, self.dtype, self.label_smoothing = head, dtype, label_smoothing
        self.hidden, self.adapter_input = hidden, adapter_input
        self.weight = head.weight.to(dtype)
        self.row_values = None if head.row_values is None else head.row_values.to(dtype)
        self.adapter_output = None if head.adapter_output is None else head.adapter_output.to(dtype)
        inputs = (hidden, head.weight, head.bias, head.row_values, adapter_input, head.adapter_output)
        self.gradients = [
            torch.zeros_like(tensor, dtype=torch.float32) if needed and tensor is not None else None
            for tensor, needed in zip(inputs, needs_grad, strict=True)
        ]
        self.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        positions, vocabulary = hidden.shape[0], head.weight.shape[0]
        most = max(1, LOGITS_CHUNK_BYTES // (4 * vocabulary))
        self.rows = max(1, math.ceil(positions / max(1, math.ceil(positions / most))))  # chunks of about the same size

    def run(self, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), device=targets.device)
        correct = torch.zeros((), dtype=torch.long, device=targets.device)
        for start in range(0, targets.shape[0], self.rows):
            span = slice(start, start + self.rows)
            chunk_loss, chunk_correct = self._chunk(span, targets[span], weights[span])
            loss += chunk_loss
            correct += chunk_correct
        self.gradients = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(self.gradients, self.dtypes, strict=True)
        ]
        return loss, correct

    def _chunk(self, span: slice, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._logits(span)
        targets, weights = targets[:, None], weights[:, None]
        largest, best = _find_largest(logits)
        of_target = logits.gather(1, targets)
        epsilon, vocabulary = self.label_smoothing, logits.shape[1]
        mean = logits.mean(1, keepdim=True) if epsilon else of_target
        probabilities = _softmax_in_place(logits, largest)
        log_total = largest - probabilities.gather(1, best).log()
        losses = log_total - (1 - epsilon) * of_target - epsilon * mean
        if any(gradient is not None for gradient in self.gradients):
            # Gradient of the logits: softmax minus (smoothed) target. Its weights are factors of the products below.
            gradient = probabilities.sub_(epsilon / vocabulary) if epsilon else probabilities
            gradient.scatter_add_(1, targets, torch.full_like(of_target, epsilon - 1))
            self._backward(gradient, weights, span)
        return (losses * weights).sum(), (best == targets).sum()

    def _logits(self, span: slice) -> Tensor:
        hidden = self.hidden[span].to(self.dtype)
        logits = product(hidden, self.weight.T).float()
        if self.adapter_input is not None and self.adapter_output is not None:
            logits += self.adapter_input[span].to(self.dtype) @ self.adapter_output.T
        if self.head.row_ids is not None and self.row_values is not None:
            logits[:, self.head.row_ids] = (hidden @ self.row_values.T).float()
        if self.head.bias is not None:
            logits += self.head.bias.float()
        return logits

    def _backward(self, gradient: Tensor, weights: Tensor, span: slice) -> None:
        """Backpropagate a chunk into the gradients of all inputs.

        Args:
            gradient: [n, V], of the unweighted loss of each position with respect to its logits.
            weights: [n, 1], of the positions.
        """
        to_hidden, to_weight, to_bias, to_rows, to_adapter_input, to_adapter_output = self.gradients
        hidden = (self.hidden[span] * weights).to(self.dtype)
        if to_bias is not None:
            to_bias += (weights.T @ gradient)[0]
        row_ids = self.head.row_ids
        of_rows = None
        if row_ids is not None and self.row_values is not None:
            of_rows = gradient[:, row_ids].to(self.dtype)
            gradient[:, row_ids] = 0
            if to_rows is not None:
                to_rows += of_rows.T @ hidden
        narrow = gradient.to(self.dtype)
        if to_hidden is not None:
            torch.mul(product(narrow, self.weight), weights, out=to_hidden[span])
            if of_rows is not None and self.row_values is not None:
                to_hidden[span] += (of_rows @ self.row_values) * weights
        if to_weight is not None and self.dtype == torch.float32:
            to_weight.addmm_(narrow.T, hidden)
        elif to_weight is not None:
            for first in range(0, to_weight.shape[0], _BLOCK):
                block = slice(first, first + _BLOCK)
                to_weight[block] += narrow[:, block].T @ hidden
        if self.adapter_input is not None and self.adapter_output is not None:
            if to_adapter_input is not None:
                torch.mul(narrow @ self.adapter_output, weights, out=to_adapter_input[span])
            if to_adapter_output is not None:
                to_adapter_output += narrow.T @ (self.adapter_input[span] * weights).to(self.dtype)


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
