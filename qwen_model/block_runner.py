"""Running the blocks of a model one at a time, with the inputs that the model itself would give them.

Shapes: B batch, T tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qwen_model.architectures import Architecture, architecture_of


def architecture_of_model(model: Any) -> Architecture:
    """The architecture of a model in memory."""
    return architecture_of(model.config.model_type)


def blocks_of(model: Any) -> nn.ModuleList:
    """The blocks of a model in their order."""
    blocks = model.get_submodule(architecture_of_model(model).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


@torch.no_grad()
def capture_block_inputs(model: Any, **inputs: Any) -> tuple[Tensor, list[Mapping[str, Any]]]:
    """Run a model without its blocks and return the inputs that they would be called with.

    Args:
        inputs: those of the model without its head: ``input_ids`` or ``inputs_embeds``, ``attention_mask``...

    Returns:
        The states [B, T, C] that enter the first block, and the other arguments of each block: masks, rotary tables.
    """
    with _recording(blocks_of(model), architecture_of_model(model).block_returns_tuple) as calls:
        model.base_model(**inputs, use_cache=False)
    return calls[0][0], [arguments for _, arguments in calls]


def run_block(block: nn.Module, states: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The output [B, T, C] of a block.

    Args:
        arguments: those of ``capture_block_inputs`` for this block.
    """
    output = block(states, **arguments)
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _recording(blocks: nn.ModuleList, returns_tuple: bool) -> Iterator[list[tuple[Tensor, Mapping[str, Any]]]]:
    """Replace the ``forward`` of all blocks by one that records its states and arguments and returns the states."""
    calls: list[tuple[Tensor, Mapping[str, Any]]] = []

    def record(hidden_states: Tensor, **arguments: Any) -> Any:
        calls.append((hidden_states, arguments))
        return (hidden_states, None) if returns_tuple else hidden_states

    for block in blocks:
        block.forward = record  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        for block in blocks:
            del block.forward
