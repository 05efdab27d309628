"""Bytes that are allocated during a step: a dispatch mode follows the storages of all tensors.

Under ``FakeTensorMode`` storages have sizes and lifetimes, but no data. Every storage is noted when an operator returns
it, and again when its last tensor dies (a weak reference). What it was for is known once the step is over: a tensor
that outlives the forward pass that made it was kept for the backward pass.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

COMPONENTS = ("weights", "adapter", "gradients", "optimizer", "activations", "loss", "workspace")

_CPU = torch.device("cpu")
_DISPATCHING = ("_is_called_by_autograd", "_note_sum", "_pass_on", "__torch_dispatch__", "_fn", "inner")
_HOST = "host"  # not on the device
_CUDA_UNIT = 512
"""CUDA's caching allocator gives out multiples of it; ``torch.cuda.max_memory_allocated`` counts these."""

_MORE_FLOPS: dict[str, Callable[..., int]] = {
    "aten.addmm_": flop_registry[torch.ops.aten.addmm],
    "aten._scaled_dot_product_flash_attention_for_cpu": sdpa_flop,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": sdpa_backward_flop,
    "mkldnn._linear_pointwise": lambda x, weight, *_, **__: 2 * x.numel() * weight.shape[0],
}


@dataclass(slots=True)
class _Storage:
    """A storage that has lived.

    Attributes:
        size: in bytes, as the allocator rounds it.
        born, died: numbers of events; ``died`` is ``None`` while it lives.
        is_forward: made by a forward pass, or by its repetition under gradient checkpointing.
        component: one of ``COMPONENTS`` if it has been marked, else empty.
        dtype: of the first tensor in it.
    """

    size: int
    born: int
    phase: str
    place: str
    is_forward: bool
    dtype: torch.dtype
    component: str = ""
    died: int | None = None


@dataclass(frozen=True)
class Moment:
    """The largest moment of a part of a step.

    Attributes:
        phase: ``forward``, ``loss``, ``backward``, ``clipping``, ``optimizer`` or ``evaluation``.
        place: module whose operator allocates; empty outside of modules.
        components: bytes by ``COMPONENTS``.
    """

    phase: str
    place: str
    components: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.components.values())


class FollowedMemory(TorchDispatchMode):
    """Follows storages, and counts floating-point operations.

    Args:
        device_type: whose allocator rounds; a tensor that operators create on this device is made on the CPU.
        lengths: of the samples of a batch.
        names: modules whose calls are told apart, with their names. The name of the model itself is empty: what
            it computes outside of its parts is the loss.
    """

    def __init__(self, device_type: str, names: Mapping[nn.Module, str], lengths: Sequence[int]) -> None:
        super().__init__()
        self.lengths = lengths
        self.names, self.device_type = names, device_type
        self.phase, self.flops = "start", dict[str, int]()
        self.is_inside = False  # an operator is passed on
        self._is_on_host = False
        self._unit = _CUDA_UNIT if device_type == "cuda" else 1
        self._storages: list[_Storage] = []
        self._living: dict[int, tuple[int, Any]] = {}  # address -> number, weak reference
        self._events: list[int] = []  # n: storage n is allocated; -1 - n: it is released
        self._first = 0
        self._calls: list[str] = []
        self._backward_place = ""
        self._sum: tuple[_Storage, set[int]] | None = None  # of gradients, and the numbers of its terms

    # ---------------------------------------------------------------------------------------------- following

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (device := kwargs.get("device")) is not None and device.type == self.device_type:
            kwargs = {**kwargs, "device": _CPU}
        was_inside, self.is_inside = self.is_inside, True
        try:
            return self._pass_on(func, args, kwargs)
        finally:
            self.is_inside = was_inside

    def _pass_on(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        outputs = func(*args, **kwargs)
        if func is torch.ops.aten.add.Tensor and self.phase == "backward":
            self._note_sum(outputs, args)
            return outputs
        # Further formulas are registered when an attention is imported.
        if formula := flop_registry.get(func.overloadpacket) or _MORE_FLOPS.get(str(func.overloadpacket)):
            count = formula(*args, **kwargs, out_val=outputs)
            if func.namespace == "torch_attn":  # torch takes the longest sample for all: the lengths are no data here
                count = (
                    count * sum(length**2 for length in self.lengths) // (len(self.lengths) * max(self.lengths) ** 2)
                )
            self.flops[self.phase] = self.flops.get(self.phase, 0) + count
        if isinstance(outputs, Tensor):
            self.follow(outputs)
        elif outputs is not None:
            for output in tree_leaves(outputs):
                if isinstance(output, Tensor):
                    self.follow(output)
        return outputs

    def follow(self, tensor: Tensor) -> _Storage:
        """Note the storage of a tensor."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._living:
            return self._storages[self._living[address][0]]
        number, size = len(self._storages), -(-storage.nbytes() // self._unit) * self._unit
        is_forward = self.phase in ("forward", "evaluation") or bool(self._calls) or torch.is_grad_enabled()
        noted = _Storage(size, len(self._events), self.phase, self.place, is_forward, tensor.dtype)
        if self._is_on_host:
            noted.component = _HOST
        self._storages.append(noted)
        self._sum = None
        self._living[address] = number, weakref.ref(storage, partial(self._release, address))
        self._events.append(number)
        return noted

    def _release(self, address: int, _: Any) -> None:
        number, _ = self._living.pop(address)
        index = len(self._events)
        if self._sum is not None and number in self._sum[1]:  # the sum takes its place
            index = self._sum[0].born
            for event in self._events[index + 1 :]:  # what has been released since
                later = self._storages[-1 - event]
                later.died = index + 2 if later.died is None else later.died + 1
            self._sum[0].born = index + 1
            self._sum = None
        self._storages[number].died = index
        self._events.insert(index, -1 - number)

    def _note_sum(self, output: Tensor, terms: Sequence[Any]) -> None:
        """Note a sum of two gradients that autograd would write into one of them.

        It does so unless a dispatch mode is active; then it makes a third tensor. Sums within the backward pass of a
        function in Python stay what they are.
        """
        numbers = {
            self._living[address][0]
            for term in terms
            if isinstance(term, Tensor) and (address := term.untyped_storage()._cdata) in self._living
        }
        noted = self.follow(output)
        if not torch.is_grad_enabled() and _is_called_by_autograd():
            self._sum = noted, numbers

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Leave out the storages that are made within the block: they are in the memory of the host."""
        self._is_on_host = True
        try:
            yield
        finally:
            self._is_on_host = False

    def mark(self, tensors: Iterable[Tensor], component: str) -> int:
        """Say what the storages of tensors are for, from their beginning on; return their bytes."""
        followed = map(self.follow, tensors)
        marked = {id(noted): noted for noted in followed if noted.component != _HOST}
        for noted in marked.values():
            noted.component = component
        return sum(noted.size for noted in marked.values())

    def begin(self) -> None:
        """Look for the peak from now on."""
        self._first = len(self._events)
        self.flops.clear()

    def enter(self, phase: str) -> None:
        self.phase, self._backward_place = phase, ""

    # ------------------------------------------------------------------------------------------------- places

    @property
    def place(self) -> str:
        """The module that is called, or in the backward pass the one whose gradients are computed."""
        return self._calls[-1] if self._calls else self._backward_place if self.phase == "backward" else ""

    @contextmanager
    def following_calls(self) -> Iterator[None]:
        """Note within the block which module is called. The hooks are global: models look at their own only."""
        handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        if (name := self.names.get(module)) is not None:
            self._calls.append(name)

    def _leave_module(self, module: nn.Module, _: Any, output: Any) -> None:
        if (name := self.names.get(module)) is None:
            return
        self._calls.pop()
        first = output[0] if isinstance(output, tuple) and output else output
        node: Any = first.grad_fn if isinstance(first, Tensor) else None
        if node is not None and "place" not in node.metadata:  # a module that returns what its last part returned
            node.metadata["place"] = name
            node.register_prehook(partial(self._enter_backward, name))

    def _enter_backward(self, name: str, _: Any) -> None:
        self._backward_place = name

    # ------------------------------------------------------------------------------------------------- result

    def moments(self, region: Callable[[str, str], str]) -> dict[str, Moment]:
        """Return the largest moment of each region.

        Args:
            region: name of the region of a phase and a place.
        """
        components = self._components()
        living = dict.fromkeys(COMPONENTS, 0)
        total, largest, found = 0, dict[str, int](), dict[str, Moment]()
        for event, number in enumerate(self._events):
            index = number if number >= 0 else -1 - number
            storage = self._storages[index]
            if components[index] == _HOST:
                continue
            size = storage.size if number >= 0 else -storage.size
            living[components[index]] += size
            total += size
            if number >= 0 and event >= self._first:
                name = region(storage.phase, storage.place)
                if total > largest.get(name, -1):
                    largest[name] = total
                    found[name] = Moment(storage.phase, storage.place, dict(living))
        return found

    def _components(self) -> list[str]:
        """Return what each storage was for."""
        ends, end = [0] * len(self._storages), len(self._events)
        for number in range(len(self._storages) - 1, -1, -1):  # where the forward pass that made it ends
            if not self._storages[number].is_forward:
                end = self._storages[number].born
            ends[number] = end
        return [self._component(storage, end) for storage, end in zip(self._storages, ends, strict=True)]

    def _component(self, storage: _Storage, end: int) -> str:
        if storage.component:
            return storage.component
        if is_loss(storage.phase, storage.place):
            return "loss"
        if storage.is_forward and (storage.died is None or storage.died > end):
            return "activations"
        return "workspace"

    def kept_bytes(self) -> dict[str, dict[torch.dtype, int]]:
        """Return the bytes of all activations by the module that made them and by dtype."""
        kept: dict[str, dict[torch.dtype, int]] = {}
        for storage, component in zip(self._storages, self._components(), strict=True):
            if component == "activations" and storage.born >= self._first:
                sizes = kept.setdefault(storage.place, {})
                sizes[storage.dtype] = sizes.get(storage.dtype, 0) + storage.size
        return kept


def _is_called_by_autograd() -> bool:
    """Return whether an operator was called by torch's engine, not by a function in Python."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name in _DISPATCHING:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


def is_loss(phase: str, place: str) -> bool:
    """Return whether the head or the loss computes: the model itself outside of its parts, or its head."""
    return phase in ("forward", "backward", "evaluation") and place.partition(".")[0] in ("", "lm_head")
