"""Attention within each sample of a row that holds several samples, one after the other, without padding.

The samples' lengths come as ``sequence_lengths`` with the other arguments of ``forward``. Without them the functions
below are transformers' own, so a model that takes such rows also takes padded batches and generates.

Shapes: S samples, N tokens of the row, n samples of one length, L tokens of a sample, H heads, K heads of keys and
values, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwen_model import delta_net
from qwen_model.modeling_qwen import eager_attention

Attend = Callable[..., tuple[Tensor, Tensor | None]]

NO_MASKS = {"full_attention": None, "sliding_attention": None, "linear_attention": None}
"""``attention_mask`` of a row: masks that are ready. Without them transformers builds one of [N, N] from positions."""

_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")  # they read the lengths themselves
_FUNCTIONS: dict[str, Attend] = {"sdpa": sdpa_attention_forward, "eager": eager_attention}
_NAMES = {name: f"{name}_by_sample" for name in _FUNCTIONS}


def take_rows(model: Any) -> None:
    """Make a model take rows of several samples, beside what it takes already.

    Its attention gets another name in memory; what is saved does not contain it.
    """
    for name, own_name in _NAMES.items():
        ALL_ATTENTION_FUNCTIONS.register(own_name, partial(attend_by_sample, _FUNCTIONS[name]))
        ALL_MASK_ATTENTION_FUNCTIONS.register(own_name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    delta_net.take_rows(model)
    name = model.config._attn_implementation
    if name in _NAMES:
        model.set_attn_implementation(_NAMES[name])


def ready_masks(config: Any) -> dict[str, None] | None:
    """Return the ``attention_mask`` of rows with padding on the right, from which nothing is read.

    Without one transformers reads from the positions whether samples are packed, with a mask whether it hides any.

    Returns:
        ``None`` if the attention needs a mask that transformers builds: eager, or a sliding window.
    """
    name, kinds = config._attn_implementation, getattr(config, "layer_types", None) or ()
    is_causal = name in _FLASH or (name in ("sdpa", _NAMES["sdpa"]) and "sliding_attention" not in kinds)
    return NO_MASKS if is_causal else None


def check_takes_rows(model: Any) -> None:
    """Raise unless a model keeps the samples of a row apart."""
    name = model.config._attn_implementation
    if name not in (*_NAMES.values(), *_FLASH):
        raise ValueError(f"attention {name!r} would mix the samples of a row; call take_rows(model) first")
    if not delta_net.takes_rows(model):
        raise ValueError("the delta nets would mix the samples of a row; call take_rows(model) first")


def attend_by_sample(
    attend: Attend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_lengths: Sequence[int] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute causal attention within each sample; samples of equal length in one call.

    Args:
        attend: transformers' function for a batch.
        query: [1, H, N, D].
        key, value: [1, K, N, D].
        attention_mask: used without ``sequence_lengths`` alone.
        sequence_lengths: S lengths, whose sum is N; ``None``: attend to the batch [B, ...] as it is.
        cu_seq_lens_q: int32 [S + 1], where each sample begins; without it each sample takes a kernel of its own.
        kwargs: those of ``attend``.

    Returns:
        [1, N, H, D]; no weights if there are ``sequence_lengths``.
    """
    if sequence_lengths is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    window, scale, longest = kwargs.get("sliding_window"), kwargs.get("scaling"), max(sequence_lengths)
    if attend is sdpa_attention_forward and not kwargs.get("dropout"):
        if cu_seq_lens_q is not None and _runs_varlen(query):
            return _attend_varlen(query, key, value, cu_seq_lens_q, longest, scale, window), None
        if query.device.type == "cpu" and (window is None or longest <= window):
            states = (each.transpose(1, 2) for each in (query, key, value))
            row: Tensor = _RowAttention.apply(*states, sequence_lengths, scale)
            return row, None
    by_length: dict[int, list[int]] = {}
    for sample, length in enumerate(sequence_lengths):
        by_length.setdefault(length, []).append(sample)
    # A split has one gradient, slices would have a zero-filled one of the whole row each.
    pieces = [states.split(list(sequence_lengths), dim=2) for states in (query, key, value)]
    outputs: dict[int, Tensor] = {}
    for length, samples in by_length.items():
        batch = [
            torch.cat([piece[sample] for sample in samples]) if samples[1:] else piece[samples[0]] for piece in pieces
        ]
        is_masked = attend is eager_attention or (window is not None and length > window)
        output, _ = attend(module, *batch, _sample_mask(length, window, query) if is_masked else None, **kwargs)
        outputs |= zip(samples, output.split(1), strict=True)
    return torch.cat([outputs[sample] for sample in range(len(outputs))], dim=1), None


class _RowAttention(torch.autograd.Function):
    """Causal attention within each sample by torch's flash attention for CPUs, from and to [1, N, heads, D].

    Keys and values of fewer heads are not repeated. It computes in float32: the kernel's backward pass takes several
    times as long in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float | None
    ) -> Tensor:
        outputs, totals = [], []
        for inputs in _by_sample(lengths, query, key, value):
            output, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *inputs, is_causal=True, scale=scale
            )
            outputs.append(output)
            totals.append(total)
        row = _joined(outputs, _kernel_dtype(query))
        ctx.save_for_backward(query, key, value, row, *totals)
        ctx.lengths, ctx.scale = lengths, scale
        return row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, row, *totals = ctx.saved_tensors
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        samples = zip(_by_sample(ctx.lengths, gradient, query, key, value, row), totals, strict=True)
        gradients = zip(
            *(backward(*inputs, total, 0.0, True, scale=ctx.scale) for inputs, total in samples), strict=True
        )
        inputs = (query, key, value)
        return *(_joined(parts, states.dtype) for parts, states in zip(gradients, inputs, strict=True)), None, None


def _by_sample(lengths: Sequence[int], *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Iterate over the samples of rows [1, N, heads, D] as the kernel takes them, [1, heads, L, D]."""
    wide = (row.to(torch.promote_types(row.dtype, torch.float32)) for row in rows)
    return zip(*(row.transpose(1, 2).split(list(lengths), dim=2) for row in wide), strict=True)


def _joined(samples: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Join samples [1, heads, L, D] to a row [1, N, heads, D]."""
    parts = [states.transpose(1, 2) for states in samples]
    return (torch.cat(parts, dim=1) if parts[1:] else parts[0]).to(dtype)


def _sample_mask(length: int, window: int | None, states: Tensor) -> Tensor:
    """Return the mask [L, L] that is added to the scores of a sample: causal, within a sliding window."""
    positions = torch.arange(length, device=states.device)
    distances = positions[:, None] - positions
    hidden = distances < 0 if window is None else (distances < 0) | (distances >= window)
    return torch.zeros(hidden.shape, dtype=states.dtype, device=states.device).masked_fill(
        hidden, torch.finfo(states.dtype).min
    )


def _runs_varlen(query: Tensor) -> bool:
    """Return whether one kernel of torch computes all samples: on NVIDIA's GPUs, in half precision."""
    return (
        query.is_cuda
        and _kernel_dtype(query) in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _kernel_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    """Compute the attention of all samples with one kernel, [1, N, H, D]."""
    from torch.nn.attention.varlen import varlen_attn

    dtype, is_grouped = _kernel_dtype(query), query.shape[1] != key.shape[1]
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    left = -1 if window is None else window - 1
    output = varlen_attn(
        query, key, value, starts, starts, longest, longest, scale=scale, window_size=(left, 0), enable_gqa=is_grouped
    )
    assert isinstance(output, Tensor)
    return output[None]
