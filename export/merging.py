"""A merge, planned: which tensors of which base under which names, and the config that tells of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoints.fold import EMBEDDINGS, Fold, WeightedAdapter, plan_fold
from checkpoints.model_config import with_dtype
from checkpoints.source import InDtype, TensorSource, View, main_dtype
from errors import ConfigError
from export.bases import Base, choose_dtype
from export.layouts.config import KEPT, config_to_qwen, config_to_qwen2
from export.layouts.qwen2_names import layout_of_names
from export.layouts.tensors import to_qwen, to_qwen2

logger = logging.getLogger(__name__)


class Rounded(View):
    """What is computed and will be rounded when it is written; looks at some rows of it to tell what that loses."""

    _SAMPLE = 64

    def __init__(self, below: TensorSource) -> None:
        super().__init__(below)
        self._lost = self._total = 0.0  # sums of squares of errors and values

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        exact, dtype = self.below.rows(name, start, stop), self.dtype(name)
        if exact.dtype != dtype:
            values = exact[: self._SAMPLE].to(torch.float32).flatten()
            error = values.to(dtype).to(torch.float32).sub_(values)
            self._lost += float(error.dot(error))
            self._total += float(values.dot(values))
        return exact

    def relative_error(self) -> float:
        """Root mean square of the errors by that of the values, in the rows that were looked at so far."""
        return (self._lost / self._total) ** 0.5 if self._total else 0.0


@dataclass(frozen=True)
class Merge:
    """What :func:`plan_merge` has found out.

    Attributes:
        fold: base and adapters, in the adapters' layout and in float32.
        fold_config: the base's config in that layout.
        source: the merged tensors as they are written.
        config: the merged checkpoint's config.json.
        layout: of what is written, ``qwen`` or ``qwen2`` (which Qwen3's names belong to as well).
    """

    base: Base
    adapters: Sequence[WeightedAdapter]
    fold: Fold
    fold_config: dict[str, Any]
    source: Rounded
    config: dict[str, Any]
    layout: str

    @property
    def dtype(self) -> str:
        """The name of what most of the weights are written in."""
        return _name_of(main_dtype(self.source))

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.fold.shape(next(name for name in EMBEDDINGS if name in self.fold))[0]

    def summary(self) -> str:
        """What was done, in a line."""
        text = f"{len(self.fold.changed)} of {len(self.fold.names())} tensors changed"
        if self.base.quantization:
            text += f", those of {self.base.quantization} dequantised"
        if (error := self.source.relative_error()) > 1e-6:
            text += f"; rounding to {self.dtype} moves the weights by {error:.2%}"
        return text


def plan_merge(base: Base, adapters: Sequence[WeightedAdapter], layout: str, dtype: str) -> Merge:
    """Check that everything fits together; reads no more than headers and the adapters.

    Args:
        layout: ``qwen``, ``qwen2``, or ``auto`` for that of the base.
        dtype: ``bf16``, ``fp16``, ``fp32``, or ``auto`` for that of the base.

    Raises:
        ConfigError: adapters that do not fit the base, or a base that the layout has no place for.
    """
    if base.quantization:
        logger.info("the base is quantised (%s): its weights are dequantised and stay so", base.quantization)
    stored = layout_of(base.config)
    layouts = {str(each.adapter.folder): layout_of_names(each.adapter.edits) or stored for each in adapters}
    if len(set(layouts.values())) > 1:
        listed = ", ".join(f"{folder} ({layout})" for folder, layout in layouts.items())
        fix = "Bring them to one with python -m scripts.convert_layout"
        raise ConfigError(f"--adapter: the adapters have names of several layouts: {listed}", fix)
    config = {key: value for key, value in base.config.items() if key not in ("auto_map", "quantization_config")}
    source, config = relaid(base.source, config, next(iter(layouts.values())))
    fold = plan_fold(source, config, adapters)
    merged_config = config | {"tie_word_embeddings": False} if fold.untied else config
    if fold.untied:
        logger.info("the adapter trained the tied embedding and head apart: the merged checkpoint stores both")
    target = stored if layout == "auto" else layout
    merged, merged_config = relaid(fold, merged_config, target)
    chosen = choose_dtype(dtype, base.config)
    rounded = Rounded(merged if chosen is None else InDtype(merged, chosen))
    merged_config = with_dtype(merged_config, _name_of(main_dtype(rounded)))
    merged_config.pop("converted_from", None)
    if KEPT in merged_config:
        merged_config[KEPT] = {**merged_config[KEPT], "chat_format": "chatml"}
    return Merge(base, adapters, fold, config, rounded, merged_config, target)


def layout_of(config: dict[str, Any]) -> str:
    """The layout that a config's ``model_type`` has."""
    return "qwen" if config.get("model_type") == "qwen" else "qwen2"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def relaid(
    source: TensorSource, config: dict[str, Any], layout: str, dynamic_ntk: bool = False
) -> tuple[TensorSource, dict[str, Any]]:
    """Tensors and config in a layout.

    Args:
        dynamic_ntk: see :func:`export.layouts.config.config_to_qwen2`.

    Raises:
        ConfigError: a model that the layout has no place for.
    """
    if layout_of(config) == layout:
        return source, config
    if layout == "qwen2":
        return to_qwen2(source, config), config_to_qwen2(config, dynamic_ntk)
    return to_qwen(source, config), config_to_qwen(config)
