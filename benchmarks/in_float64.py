"""``finetune.py`` in float64, with its flags: ``python -m benchmarks.in_float64 ...``, for ``benchmarks.engines``.

The weights are read as float64, and every cast of such a tensor to float32 is left out. It is no mode of training:
DeepSpeed keeps the optimizer's weights in float32, and results are saved in the precision of the base.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from commands import run_command


def train(argv: Sequence[str]) -> None:
    import torch
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    import training.model

    class Wide(TorchFunctionMode):
        """Keep float64 where float32 is asked for."""

        def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Any,
            args: Sequence[Any] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            tensors = [each for value in args for each in (value if isinstance(value, (list, tuple)) else [value])]
            if any(isinstance(each, Tensor) and each.dtype == torch.float64 for each in tensors):
                if func is Tensor.float:
                    return args[0]
                args = tuple(torch.float64 if each is torch.float32 else each for each in args)
                kwargs = {
                    name: torch.float64 if each is torch.float32 else each for name, each in (kwargs or {}).items()
                }
            return func(*args, **(kwargs or {}))

    training.model.weights_dtype = lambda *flags: torch.float64  # type: ignore[assignment]
    torch.set_default_dtype(torch.float64)  # of the loss that is summed over steps
    with Wide():
        runpy.run_path(str(Path(__file__).parents[1] / "finetune.py"))["main"](argv)


if __name__ == "__main__":
    run_command(train, "finetune.py")
