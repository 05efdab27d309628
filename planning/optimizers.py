"""Optimizers whose states are known by their sizes: their updates run in kernels that need values.

bitsandbytes and torchao quantise states in blocks, with a scale per block; parameters of few values keep float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errors import ConfigError
from planning.memory import FollowedMemory
from training.config.optimizers import OPTIMIZERS
from training.optimizer_checks import check_package

_FEWEST = 4096  # values of a parameter that is quantised
_FEWEST_PAGED = 10**5


@dataclass(frozen=True)
class States:
    """The states of an optimizer per parameter.

    Attributes:
        number: states of the parameter's size.
        bits: of a value; 32: it is not quantised.
        block: values that share a scale.
        is_paged: the states of large parameters are in memory that CUDA pages out, beside what torch allocates.
        skips_embeddings: those keep 32 bits, as transformers' Trainer registers them.
    """

    number: int
    bits: int = 32
    block: int = 256
    is_paged: bool = False
    skips_embeddings: bool = True


STATES = {
    "adamw_bnb_8bit": States(2, 8), "adamw_8bit": States(2, 8), "paged_adamw_32bit": States(2, is_paged=True),
    "paged_adamw_8bit": States(2, 8, is_paged=True), "ademamix": States(3), "ademamix_8bit": States(3, 8),
    "paged_ademamix_32bit": States(3, is_paged=True), "paged_ademamix_8bit": States(3, 8, is_paged=True),
    "lion_32bit": States(1), "lion_8bit": States(1, 8), "paged_lion_32bit": States(1, is_paged=True),
    "paged_lion_8bit": States(1, 8, is_paged=True), "rmsprop_bnb": States(1), "rmsprop_bnb_8bit": States(1, 8),
    "rmsprop_bnb_32bit": States(1), "adamw_torch_8bit": States(2, 8, skips_embeddings=False),
    "adamw_torch_4bit": States(2, 4, 128, skips_embeddings=False),
}  # fmt: skip
_REFUSED = ("galore_", "apollo_")


def check_can_be_rehearsed(name: str) -> None:
    """Check that the states of ``--optim`` can be created.

    Raises:
        ConfigError: its package is not installed, or its states have a rank, which is not rehearsed.
    """
    if name.startswith(_REFUSED):
        raise ConfigError(f"--optim {name} cannot be rehearsed", "Rehearse adamw_torch, whose states are larger")
    if name not in STATES and name in OPTIMIZERS:
        for fault in check_package(f"--optim {name}", OPTIMIZERS[name]):
            raise fault


class SizedOptimizer(torch.optim.Optimizer):
    """Creates the states of an optimizer at its first update, and changes no parameter.

    Args:
        states: their sizes.
        full: addresses (``id``) of parameters that keep 32 bits.
        memory: which does not count paged states.
    """

    def __init__(
        self, params: Iterable[Any], states: States, full: Set[int], memory: FollowedMemory, lr: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr})
        self.states, self.full, self.memory = states, full, memory

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter not in self.state:
                    self.state[parameter] = self._create(parameter)

    def _create(self, parameter: Tensor) -> dict[str, Tensor]:
        count, states = parameter.numel(), self.states
        is_full = states.bits == 32 or count < _FEWEST or id(parameter) in self.full
        kept = {}
        for number in range(states.number):
            with self.memory.on_host() if states.is_paged and count >= _FEWEST_PAGED else nullcontext():
                kept[f"state{number}"] = _values(parameter, count, is_full, states.bits)
            if not is_full:
                kept[f"scales{number}"] = parameter.new_empty(-(-count // states.block), dtype=torch.float32)
        return kept


def _values(parameter: Tensor, count: int, is_full: bool, bits: int) -> Tensor:
    if is_full:
        return parameter.new_empty(count, dtype=torch.float32)
    return parameter.new_empty(count * bits // 8, dtype=torch.uint8)


def sized_optimizer(name: str, model: nn.Module, memory: FollowedMemory) -> tuple[Any, dict[str, Any]] | None:
    """Return class and arguments of an optimizer that is known by its sizes; ``None`` for any other ``--optim``."""
    states = STATES.get(name)
    if states is None:
        return None
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    full = {id(parameter) for module in embeddings for parameter in module.parameters() if states.skips_embeddings}
    return SizedOptimizer, {"states": states, "full": full, "memory": memory}
