"""Plan a merge: which tensors are written, under which names and in which dtype, and the config.json beside them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from checkpoints.fold import Fold, WeightedAdapter, plan_fold
from checkpoints.model_config import (
    DTYPE_NAMES,
    ROUNDED_AS,
    ROUNDINGS,
    Quantization,
    Rounding,
    declared_dtype,
    dtype_name,
    result_config,
)
from checkpoints.other_parts import WithOtherParts
from checkpoints.source import InDtype, TensorSource, main_dtype
from checkpoints.whole import with_text_config
from console import python_command
from errors import ConfigError
from export.inputs import Base
from export.kept_change import ENOUGH, RoundedTensors
from export.layouts.config import QWEN_CONFIG
from export.layouts.convert import convert_model, convert_tensors
from export.layouts.qwen2_names import layout_of_config, layout_of_names
from export.quantized_form import as_quantized
from qwen_model.architectures import EMBEDDING_WEIGHTS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergePlan:
    """Result of :func:`plan_merge`.

    Attributes:
        fold: base and adapters folded in float32, in the adapters' layout.
        fold_config: the base's config.json in that layout.
        source: the merged tensors as they are written, but for what the base has beside its text model.
        config: config.json of the merged checkpoint.
        layout: layout that is written, ``qwen`` or ``qwen2`` (whose names Qwen3 shares).
        matched: how the base was rounded before the merge, as in the training of the adapters.
    """

    base: Base
    adapters: Sequence[WeightedAdapter]
    fold: Fold
    fold_config: dict[str, Any]
    source: RoundedTensors
    config: dict[str, Any]
    layout: str
    matched: Quantization | None = None

    @property
    def written(self) -> TensorSource:
        """All tensors that are written, by the names that they have in the files."""
        others = self.base.other_parts
        return self.source if others is None else WithOtherParts(self.source, others)

    @property
    def dtype(self) -> str:
        """Name of the dtype that most weights are written in."""
        return dtype_name(main_dtype(self.source))

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding."""
        return self.fold.shape(next(name for name in EMBEDDING_WEIGHTS if name in self.fold))[0]

    def summary(self) -> str:
        """Describe the merge in one line; what was kept of the change is known once the tensors are written."""
        text = f"{len(self.fold.moved)} of {len(self.fold.names())} tensors changed"
        if self.base.quantization:
            text += f", those of {self.base.quantization} dequantised"
        if self.matched:
            text += f", the base rounded as by {self.matched} in training"
        if kept := self.source.kept.describe():
            text += f"; {self.dtype} {kept}"
        return text

    def report(self) -> dict[str, Any]:
        """Return the contents of ``merge_report.json``, once the tensors are written."""
        return {
            "version": 1,
            "adapters": [{"name": each.adapter.folder.name, "weight": each.weight} for each in self.adapters],
            "dtype": self.dtype,
            "rounding": self.source.rounding,
            "base_rounded_as": None if self.matched is None else str(self.matched),
            "change": self.source.kept.report(),
        }

    def warn_of_loss(self) -> None:
        """Log a warning if no weight changed, or if the written weights hold another change than was learnt."""
        if not self.fold.moved:
            logger.warning(
                "No weight changed, so the merged model is its base: what --adapter adds is zero. Merge a trained "
                "adapter, and check the weights behind ="
            )
            return
        if (share := self.source.kept.total().share) >= ENOUGH and share <= 2 - ENOUGH:
            return
        remedies = ["--rounding dithered"] if self.source.rounding == "nearest" else []
        logger.warning(
            "%s holds %s%.1f %% of the change that the adapter learnt: the merged model answers differently. Merge "
            "again with %s",
            self.dtype,
            "only " if share < 1 else "",
            100 * share,
            " or ".join([*remedies, "--dtype fp32"]),
        )


def plan_merge(
    base: Base,
    adapters: Sequence[WeightedAdapter],
    layout: str,
    dtype: str,
    rounding: Rounding = ROUNDINGS[0],
    matched: Quantization | None = None,
) -> MergePlan:
    """Check that adapters fit the base and plan the merge; reads only headers and the adapters.

    Args:
        layout: ``qwen``, ``qwen2``, or ``auto`` for the base's.
        dtype: ``bf16``, ``fp16``, ``fp32``, or ``auto`` for the base's.
        rounding: of changed tensors that are written in 16 bits.
        matched: round the base's linear layers first, as they were in the training of the adapters.

    Raises:
        ConfigError: adapters that do not fit the base, or a base that the layout cannot express.
    """
    if base.quantization:
        logger.info("the base is quantised (%s): its weights are dequantised and stay so", base.quantization)
    base_layout = layout_of_config(base.config)
    config = {key: value for key, value in base.config.items() if key not in ("auto_map", "quantization_config")}

    # Fold in the adapters' layout, which may differ from the base's.
    source, fold_config = convert_model(base.source, config, _common_layout(adapters, base_layout))
    if matched is not None:
        source = as_quantized(source, matched, str(fold_config["model_type"]))
    fold = plan_fold(source, fold_config, adapters)
    if fold.untied:
        logger.info("the adapter trained the tied embedding and head apart: the merged checkpoint stores both")
    merged_config = fold_config | ({"tie_word_embeddings": False} if fold.untied else {})

    # Write in the layout and dtype of the flags.
    target = base_layout if layout == "auto" else layout
    before = convert_tensors(fold.before(), merged_config, target)
    merged, merged_config = convert_model(fold, merged_config, target)
    stored = choose_dtype(dtype, base.config)
    rounded = RoundedTensors(merged if stored is None else InDtype(merged, stored), before, rounding)

    merged_config = with_text_config(base.file_config, merged_config)
    merged_config = result_config(merged_config, dtype_name(main_dtype(rounded)))
    if matched is not None:
        merged_config[ROUNDED_AS] = str(matched)
    if QWEN_CONFIG in merged_config:
        merged_config[QWEN_CONFIG] = {**merged_config[QWEN_CONFIG], "chat_format": "chatml"}
    return MergePlan(base, adapters, fold, fold_config, rounded, merged_config, target, matched)


def choose_dtype(flag: str, config: dict[str, Any]) -> torch.dtype | None:
    """Return the dtype that floats are written in; ``None`` keeps each tensor's own.

    A base that declares float32 but is stored in 16 bits is loaded, tuned and hence merged in float32: rounding would
    lose part of what was trained.
    """
    if flag != "auto":
        dtype: torch.dtype = getattr(torch, DTYPE_NAMES[flag])
        return dtype
    return torch.float32 if declared_dtype(config) == "float32" else None


def _common_layout(adapters: Sequence[WeightedAdapter], default: str) -> str:
    """Return the layout of all adapters, ``default`` if their names fit any; raise ConfigError if they differ."""
    layouts = {str(each.adapter.folder): layout_of_names(each.adapter.edits) or default for each in adapters}
    if len(set(layouts.values())) > 1:
        listed = ", ".join(f"{folder} ({layout})" for folder, layout in layouts.items())
        fix = f"Convert them to one layout with {python_command('-m scripts.convert_layout')}"
        raise ConfigError(f"--adapter: the adapters have names of different layouts: {listed}", fix)
    return next(iter(layouts.values()))
