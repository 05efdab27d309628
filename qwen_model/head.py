"""The tensors of a language-model head, also inside peft's wrappers.

The lean loss multiplies with the head's tensors itself: the weight, its trained rows, a low-rank adapter. Wrappers are
recognised by their attributes, so that peft need not be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Head:
    """logits = x W'^T + bias + adapter_input(x) adapter_output^T, where W' is W with the rows ``row_ids`` replaced.

    Attributes:
        weight: W, [V, C].
        bias: [V].
        row_ids, row_values: [K] and [K, C].
        adapter: first matrix of a low-rank adapter, a module [N, C] -> [N, R].
        adapter_output: [V, R], scaled.
    """

    weight: Tensor
    bias: Tensor | None = None
    row_ids: Tensor | None = None
    row_values: Tensor | None = None
    adapter: Any = None
    adapter_output: Tensor | None = None

    def adapter_input(self, hidden: Tensor) -> Tensor | None:
        """The input [N, R] of ``adapter_output``."""
        return None if self.adapter is None else self.adapter(hidden)


def head_of(module: nn.Module) -> Head:
    """Return the tensors of a head.

    Raises:
        TypeError: an unsupported wrapper.
    """
    if isinstance(module, nn.Linear) and not hasattr(module, "base_layer"):
        return Head(module.weight, module.bias)
    wrapper: Any = module
    if hasattr(wrapper, "token_adapter"):  # peft's trainable tokens
        return _with_rows(wrapper.token_adapter)
    if hasattr(wrapper, "modules_to_save"):  # peft's trained copy of the original
        return head_of(_active_copy(wrapper))
    if hasattr(wrapper, "lora_A"):
        return _with_lora(wrapper)
    raise TypeError(f"the lean loss does not support a head of type {type(module).__name__}; use --loss full_logits")


def parts_of(module: nn.Module) -> list[nn.Module]:
    """Return the modules whose parameters ``head_of`` reads, the outermost first."""
    parts = [module]
    wrapper: Any = module
    if hasattr(wrapper, "token_adapter"):
        parts += [wrapper.token_adapter, *parts_of(wrapper.token_adapter.get_base_layer())]
    elif hasattr(wrapper, "modules_to_save"):
        parts += parts_of(_active_copy(wrapper))
    elif hasattr(wrapper, "lora_A"):
        names = _active(wrapper, wrapper.lora_A)
        parts += [*(wrapper.lora_B[name] for name in names), *parts_of(wrapper.get_base_layer())]
    return parts


def call_within(modules: Sequence[nn.Module], function: Callable[..., Any], *inputs: Any) -> Any:
    """Call a function in place of the modules' ``forward``, nested: each module's call is inside the previous one's.

    ZeRO-3 and FSDP gather parameters in hooks around a module's call, and find out from its inputs and outputs when to
    reduce the gradients. Parameters used outside of the call would stay sharded.
    """
    if not modules:
        return function(*inputs)
    module, *rest = modules
    own = vars(module).get("forward")  # an instance attribute, set by a wrapper
    module.forward = lambda *args: call_within(rest, function, *args)
    try:
        return module(*inputs)
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _active_copy(wrapper: Any) -> nn.Module:
    """Return the module that peft's ``ModulesToSaveWrapper`` calls: the active copy, else the original."""
    disabled = getattr(wrapper, "disable_adapters", False)
    names = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return wrapper.original_module if disabled or not names else wrapper.modules_to_save[names[0]]


def _active(layer: Any, parts: Any) -> list[str]:
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in parts]


def _with_rows(layer: Any) -> Head:
    head = head_of(layer.get_base_layer())
    for name in _active(layer, layer.trainable_tokens_delta):
        head.row_ids = torch.tensor(layer.token_indices[name], device=head.weight.device)
        head.row_values = layer.trainable_tokens_delta[name]
    return head


def _with_lora(layer: Any) -> Head:
    head = head_of(layer.get_base_layer())
    names = _active(layer, layer.lora_A)
    if len(names) > 1 or any(layer.use_dora.get(name, False) for name in names):
        raise TypeError("the lean loss supports one plain LoRA adapter on the head; use --loss full_logits")
    if names:
        name = names[0]
        down, dropout = layer.lora_A[name], layer.lora_dropout[name]
        head.adapter = lambda hidden: down(dropout(hidden.to(down.weight.dtype)))
        head.adapter_output = layer.lora_B[name].weight * layer.scaling[name]
    return head
