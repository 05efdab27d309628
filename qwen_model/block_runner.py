"""Where each family has its parts, and what the blocks of a model are called with: for running them one at a time.

Shapes: B batch, T tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HEAD = "lm_head"


@dataclass(frozen=True)
class Places:
    """Where a family has its parts; the head is ``lm_head`` in each.

    Attributes:
        embedding, blocks, norm: names of the embedding, of the list of blocks, and of the norm behind them.
        gives_tuple: whether a block's output is a tuple that begins with the states.
    """

    embedding: str
    blocks: str
    norm: str
    gives_tuple: bool = False


_LATER = Places("model.embed_tokens", "model.layers", "model.norm")
PLACES = {
    "qwen": Places("transformer.wte", "transformer.h", "transformer.ln_f", gives_tuple=True),
    "qwen2": _LATER,
    "qwen3": _LATER,
}


def places_of(model: Any) -> Places:
    """The places of a Qwen model of any family."""
    return PLACES[model.config.model_type]


def blocks_of(model: Any) -> nn.ModuleList:
    """The blocks of a model in their order."""
    blocks: nn.ModuleList = model.get_submodule(places_of(model).blocks)
    return blocks


@torch.no_grad()
def capture_block_inputs(model: Any, **inputs: Any) -> tuple[Tensor, list[Mapping[str, Any]]]:
    """What the blocks of a model would be called with, while none of them computes.

    Args:
        inputs: of the model without its head: ``input_ids`` or ``inputs_embeds``, ``attention_mask``...
    Returns:
        The states [B, T, C] that enter the first block, and for each block its other arguments: masks, rotary tables.
    """
    with _only_listening(blocks_of(model), places_of(model).gives_tuple) as heard:
        model.base_model(**inputs, use_cache=False)
    return heard[0][0], [arguments for _, arguments in heard]


def run_block(block: nn.Module, states: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The states [B, T, C] behind a block."""
    output: Any = block(states, **arguments)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


@contextmanager
def _only_listening(blocks: nn.ModuleList, gives_tuple: bool) -> Iterator[list[tuple[Tensor, Mapping[str, Any]]]]:
    """Within it blocks compute nothing: they hand on what they get, and note it, states and other arguments."""
    heard: list[tuple[Tensor, Mapping[str, Any]]] = []

    def listen(hidden_states: Tensor, **arguments: Any) -> Any:
        heard.append((hidden_states, arguments))
        return (hidden_states, None) if gives_tuple else hidden_states

    for block in blocks:
        block.forward = listen  # type: ignore[method-assign]
    try:
        yield heard
    finally:
        for block in blocks:
            del block.forward
