"""Linear layers with weights of 16 bits for CPUs whose instructions do not multiply 16 bits.

There torch multiplies bfloat16 and float16 number by number, several times slower than float32. FBGEMM, which torch
brings for x86, keeps a weight in float16, in the order in which its kernel reads it, and multiplies it with an input in
float32. A weight is multiplied by a power of two before, so that its largest number is near the end of float16's range:
then every number of bfloat16 above a 2^30th of the largest is one of float16, and what is smaller is rounded by less
than a 2^39th of the largest. Sums are those of the layer's own product in another order, in float32, rounded once.

Shapes: C inputs, O outputs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_ENGINES = ("fbgemm", "x86")  # of torch.backends.quantized: those that use FBGEMM
_LARGEST_EXPONENT = 15  # numbers of float16 are below 2 ** 16


class PackedLinear(nn.Module):
    """A linear layer whose weight exists in FBGEMM's order alone.

    Args:
        packed: of the weight times 1 / ``scale``, with the bias in float32.
        scale: a power of two.
        layer: whose result it computes, in the dtype of the input.
    """

    def __init__(self, packed: Any, scale: float, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._packed, self._multiply = packed, torch.ops.quantized.linear_dynamic_fp16.default
        self._scale = torch.tensor([scale], dtype=torch.float32)  # not of zero dimensions: it makes products float32

    def forward(self, states: Tensor) -> Tensor:
        """Return the layer's output for states [..., C]."""
        output: Tensor = self._multiply(states * self._scale, self._packed)
        return output.to(states.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def is_slow(weight: Tensor) -> bool:
    """Return whether torch multiplies with a weight number by number where FBGEMM could."""
    if weight.device.type != "cpu" or torch.backends.quantized.engine not in _ENGINES:
        return False
    if weight.dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


class Packer:
    """Packs layers on several threads: the packing of a number takes as long as its use in a hundred products.

    ``with`` waits until all layers are packed.
    """

    def __init__(self) -> None:
        self._threads = min(4, torch.get_num_threads())
        self._pool = ThreadPoolExecutor(self._threads)
        self._begun: list[Any] = []
        self._numbers, self._start = 0, time.perf_counter()

    def pack(self, layer: nn.Linear, put: Callable[[PackedLinear], object]) -> None:
        """Pack a layer, and hand the result to ``put``; a layer with numbers that are not finite stays as it is."""
        weight = layer.weight.detach()
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        if not math.isfinite(largest) or not largest:
            return
        exponent = min(_LARGEST_EXPONENT - math.frexp(largest)[1], 100)  # float32 has both powers of two
        bias = None if layer.bias is None else layer.bias.detach().float()
        scaled = weight.float().mul_(2.0**exponent)

        def run() -> None:
            packed = torch.ops.quantized.linear_prepack_fp16(scaled, bias)
            put(PackedLinear(packed, 2.0**-exponent, layer))

        if len(self._begun) >= self._threads:  # their weights exist in float32, too
            self._begun.pop(0).result()
        self._begun.append(self._pool.submit(run))
        self._numbers += weight.numel()

    def __enter__(self) -> Packer:
        return self

    def __exit__(self, *error: object) -> None:
        with self._pool:
            for each in self._begun:
                each.result()
        if self._numbers:
            seconds = time.perf_counter() - self._start
            logger.info("%d million weights packed for this processor in %.1f s", self._numbers // 10**6, seconds)
