"""A language-model head taken apart, whatever peft has wrapped around it.

The lean loss multiplies with the head's tensors itself, so it must know them: the weight, rows of it that are trained
apart, a low-rank adapter. Wrappers are recognised by what they hold; peft need not be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Head:
    """logits = x W' + bias + adapter_input(x) adapter_output, where W' is W with the rows ``row_ids`` replaced.

    Attributes:
        weight: W, [V, C].
        bias: [V].
        row_ids, row_values: [K] and [K, C].
        adapter: the module of a low-rank adapter, which gives [N, R] for [N, C].
        adapter_output: [V, R], scaled.
    """

    weight: Tensor
    bias: Tensor | None = None
    row_ids: Tensor | None = None
    row_values: Tensor | None = None
    adapter: Any = None
    adapter_output: Tensor | None = None

    def adapter_input(self, hidden: Tensor) -> Tensor | None:
        """What goes into ``adapter_output``, [N, R]."""
        return None if self.adapter is None else self.adapter(hidden)


def head_of(module: nn.Module) -> Head:
    """The tensors of a head.

    Raises:
        TypeError: a wrapper that is not known here.
    """
    if isinstance(module, nn.Linear) and not hasattr(module, "base_layer"):
        return Head(module.weight, module.bias)
    wrapper: Any = module
    if hasattr(wrapper, "token_adapter"):  # peft's trainable tokens
        return _with_rows(wrapper.token_adapter)
    if hasattr(wrapper, "modules_to_save"):  # peft's copy that trains in the original's place
        return head_of(_chosen(wrapper))
    if hasattr(wrapper, "lora_A"):
        return _with_lora(wrapper)
    raise TypeError(f"the lean loss does not know a head of the type {type(module).__name__}; use --loss full_logits")


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The modules whose parameters ``head_of`` takes, the outermost first."""
    parts = [module]
    wrapper: Any = module
    if hasattr(wrapper, "token_adapter"):
        parts += [wrapper.token_adapter, *parts_of(wrapper.token_adapter.get_base_layer())]
    elif hasattr(wrapper, "modules_to_save"):
        parts += parts_of(_chosen(wrapper))
    elif hasattr(wrapper, "lora_A"):
        names = _active(wrapper, wrapper.lora_A)
        parts += [*(wrapper.lora_B[name] for name in names), *parts_of(wrapper.get_base_layer())]
    return parts


def call_within(modules: Sequence[nn.Module], function: Callable[..., Any], *inputs: Any) -> Any:
    """Call a function in the place of modules' ``forward``, of each within that of the one before.

    What shards parameters (ZeRO-3, FSDP) makes them whole in hooks around a module's call, and knows by what goes in
    and comes out when their gradients are due. Using a parameter outside of such a call goes past all that.
    """
    if not modules:
        return function(*inputs)
    module, *rest = modules
    own = vars(module).get("forward")  # set by what wraps a single module
    module.forward = lambda *args: call_within(rest, function, *args)
    try:
        return module(*inputs)
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _chosen(wrapper: Any) -> nn.Module:
    """The module that peft's wrapper of a trained copy stands for."""
    disabled = getattr(wrapper, "disable_adapters", False)
    names = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    chosen: nn.Module = wrapper.original_module if disabled or not names else wrapper.modules_to_save[names[0]]
    return chosen


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
        raise TypeError("the lean loss knows one plain LoRA adapter on the head; use --loss full_logits")
    if names:
        name = names[0]
        down, dropout = layer.lora_A[name], layer.lora_dropout[name]
        head.adapter = lambda hidden: down(dropout(hidden.to(down.weight.dtype)))
        head.adapter_output = layer.lora_B[name].weight * layer.scaling[name]
    return head
