"""The tensors of linear layers and of a language-model head, also inside peft's wrappers.

The lean loss and the projections of the blocks multiply with these tensors themselves: the weight, its trained rows, a
low-rank adapter. Wrappers are recognised by their attributes, so that peft need not be installed.
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


@dataclass(slots=True)
class Adapter:
    """A plain LoRA adapter, which adds scale * up(down(dropout(x))) to the output of its layer.

    Attributes:
        down, up: linear layers C -> R and R -> V.
    """

    down: Any
    up: Any
    dropout: nn.Module
    scale: float


def adapter_of(layer: Any) -> Adapter | None:
    """Return the active adapter of a wrapper that is not opaque."""
    downs = layer.lora_A
    for name in _active(layer, downs):
        return Adapter(downs[name], layer.lora_B[name], layer.lora_dropout[name], layer.scaling[name])
    return None


def base_and_adapter(layer: nn.Module) -> tuple[Any, Adapter | None] | None:
    """Return a linear layer without its wrapper, and the plain LoRA adapter on it; ``None`` if it has to be called.

    It has to be called if its output is not computed from these parts alone, or if any of them has hooks, those of
    engines included.
    """
    wrapper: Any = layer
    if type(layer) is nn.Linear or not hasattr(layer, "lora_A"):
        return (layer, None) if _is_product(layer) and is_bare(layer) else None
    if _why_lora_is_opaque(wrapper) or (wrapper.merged and wrapper.disable_adapters):  # its call would unmerge it
        return None
    base, adapter = wrapper.get_base_layer(), adapter_of(wrapper)
    parts = [wrapper, base] if adapter is None else [wrapper, base, adapter.down, adapter.up, adapter.dropout]
    return (base, adapter) if _is_product(base) and all(map(is_bare, parts)) else None


def _is_product(module: nn.Module) -> bool:
    return _is_linear(module) or (isinstance(module, nn.Linear) and hasattr(type(module), "dequantize"))


def is_bare(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return not hooks and "forward" not in vars(module)


def why_opaque(module: nn.Module) -> str:
    """Return why a head's output cannot be computed from the tensors of :func:`head_of`; empty if it can.

    Only what is known passes: a linear layer, and peft's wrappers of one. A subclass of ``nn.Linear`` with its own
    ``forward`` passes if it sets ``is_linear_map``: its output is ``x @ weight.T + bias``.
    """
    wrapper: Any = module
    if foreign := next(filter(None, map(_foreign_code, [module, *_own_parts(wrapper)])), ""):
        return foreign
    if hasattr(wrapper, "token_adapter"):  # peft's trainable tokens
        layer = wrapper.token_adapter
        if len(_active(layer, layer.trainable_tokens_delta)) > 1:
            return "has several sets of trained tokens"
        return why_opaque(layer.get_base_layer())
    if hasattr(wrapper, "modules_to_save"):  # peft's trained copy of the original
        return why_opaque(_active_copy(wrapper))
    if hasattr(wrapper, "lora_A"):
        return _why_lora_is_opaque(wrapper) or why_opaque(wrapper.get_base_layer())
    return "" if _is_linear(module) else f"is of type {type(module).__name__}"


def _is_linear(module: nn.Module) -> bool:
    if type(module) is nn.Linear:  # looking for attributes that are missing takes long
        return True
    if not isinstance(module, nn.Linear) or hasattr(module, "base_layer"):
        return False
    return type(module).forward is nn.Linear.forward or getattr(module, "is_linear_map", False)


def _why_lora_is_opaque(layer: Any) -> str:
    downs = layer.lora_A
    names = _active(layer, downs)
    if len(names) > 1:
        return "has several adapters"
    for name in names:
        variants = getattr(layer, "lora_variant", {})
        if layer.use_dora.get(name, False):
            return "has a DoRA adapter"
        if name in variants or not (_is_linear(downs[name]) and _is_linear(layer.lora_B[name])):
            return "has an adapter that is not a plain LoRA"
    return ""


def _own_parts(wrapper: Any) -> list[nn.Module]:
    """Return the modules within a wrapper, besides the wrapped one, that :func:`head_of` uses without calling them."""
    if hasattr(wrapper, "token_adapter"):
        return [wrapper.token_adapter]
    if hasattr(wrapper, "lora_A"):
        return [wrapper.lora_B[name] for name in _active(wrapper, wrapper.lora_A) if name in wrapper.lora_B]
    return []


# Their hooks gather the parameters of a sharded model (see call_within), or move inputs to the device.
_ENGINES = ("torch.distributed.", "deepspeed.", "accelerate.")


def _foreign_code(module: nn.Module) -> str:
    """Return what changes a module's output besides its class and its parameters; empty if nothing does."""
    if "forward" in vars(module) and not _is_of_engine(vars(module)["forward"]):
        return "has a forward of its own"
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    hooks += [*module._backward_pre_hooks.values(), *module._backward_hooks.values()]
    return "" if all(map(_is_of_engine, hooks)) else "has hooks"


def _is_of_engine(code: Any) -> bool:
    return str(getattr(getattr(code, "func", code), "__module__", "")).startswith(_ENGINES)


def head_of(module: nn.Module) -> Head:
    """Return the tensors of a head that is not opaque."""
    wrapper: Any = module
    if hasattr(wrapper, "token_adapter"):
        return _with_rows(wrapper.token_adapter)
    if hasattr(wrapper, "modules_to_save"):
        return head_of(_active_copy(wrapper))
    if hasattr(wrapper, "lora_A"):
        return _with_lora(wrapper)
    return Head(wrapper.weight, bias_of(wrapper))


def bias_of(layer: Any) -> Tensor | None:
    """Return the bias [O] of a linear layer without its padding, which that of a packed layer may have."""
    bias: Tensor | None = layer.bias
    return bias[: layer.out_features] if bias is not None and bias.shape[0] > layer.out_features else bias


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
    if adapter := adapter_of(layer):
        down, up, dropout = adapter.down, adapter.up, adapter.dropout
        head.adapter = lambda hidden: down(dropout(hidden.to(down.weight.dtype)))
        head.adapter_output = up.weight * adapter.scale
        head.bias = add_bias(head.bias, adapter)
    return head


def add_bias(bias: Tensor | None, adapter: Adapter) -> Tensor | None:
    """Add the bias of an adapter, if it has one, to that of its layer."""
    if adapter.up.bias is None:
        return bias
    scaled: Tensor = adapter.up.bias * adapter.scale
    return scaled if bias is None else bias + scaled
