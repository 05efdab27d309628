"""What a folder has beside its text model, such as a vision tower: written with a changed text model as it is.

The files are opened when the folder is, and stay mapped, so that the end of a long run does not look for them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.files import load_json_or_empty
from checkpoints.shards import CheckpointReader, open_checkpoint, open_left_out
from checkpoints.source import TensorSource, View
from checkpoints.whole import has_other_parts, is_whole, whole_name
from errors import ConfigError

_QUANTISED = (".qweight", ".SCB", ".weight_scale_inv")


@dataclass(frozen=True)
class OtherParts:
    """Tensors of a folder that are not the text model's, and how it names those that are.

    Attributes:
        tensors: by their stored names; there may be none.
        names_are_longer: the text model's tensors are stored by the names that they have in the whole one.
        is_whole: config.json is that of the whole model, so that other programs open its class.
    """

    tensors: CheckpointReader
    names_are_longer: bool
    is_whole: bool

    def stored_name(self, name: str) -> str:
        """Return the name under which a tensor of the text model is stored."""
        return whole_name(name) if self.names_are_longer else name


def open_other_parts(folder: Path) -> OtherParts | None:
    """Open what a folder has beside its text model; ``None`` for models that consist of that alone.

    Raises:
        ConfigError: see :func:`checkpoints.shards.open_checkpoint`; or other parts are quantised.
    """
    config = load_json_or_empty(folder / "config.json")
    if not has_other_parts(config):
        return None
    text, others = open_checkpoint(folder), open_left_out(folder)
    quantised = (name for name in others.names() if name.endswith(_QUANTISED) or ".quant_state." in name)
    if (name := next(quantised, None)) is not None:
        what = f"{folder}: {name} is quantised, and is not a part of the text model"
        raise ConfigError(what, "Use the unquantised model: the other parts are written as they are")
    return OtherParts(others, any(text.stored_name(name) != name for name in text.names()), is_whole(config))


class WithOtherParts(View):
    """A text model's tensors under the names of the whole model, with the tensors of its other parts behind them."""

    def __init__(self, below: TensorSource, others: OtherParts) -> None:
        super().__init__(below)
        self.parts, self.others = others, others.tensors
        self._names = {others.stored_name(name): name for name in below.names()}

    def names(self) -> list[str]:
        return [*self._names, *self.others.names()]

    def __contains__(self, name: str) -> bool:
        return name in self._names or name in self.others

    def _place(self, name: str) -> tuple[TensorSource, str]:
        return (self.below, self._names[name]) if name in self._names else (self.others, name)

    def shape(self, name: str) -> tuple[int, ...]:
        source, own = self._place(name)
        return source.shape(own)

    def dtype(self, name: str) -> torch.dtype:
        source, own = self._place(name)
        return source.dtype(own)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        source, own = self._place(name)
        return source.rows(own, start, stop)

    def unrounded(self) -> TensorSource:
        return WithOtherParts(self.below.unrounded(), self.parts)
