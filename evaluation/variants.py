"""How a model reads texts that are longer than those of its training: the variants of a table of perplexities.

Qwen v1 has switches for dynamic NTK and log-n attention. Later families scale their rotary embeddings as transformers
does. Needs no torch until a checkpoint is open.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoints.rope import DYNAMIC_NTK, Yarn, find_yarn_fault, load_yarn
from errors import ConfigError
from qwen_model.architectures import architecture_of

# use_dynamic_ntk and use_logn_attn of Qwen v1.
_SWITCHES = {"plain": (False, False), "ntk": (True, False), "logn": (False, True), "ntk+logn": (True, True)}
_LATER = ("plain", "ntk", "yarn")

VARIANTS = tuple(dict.fromkeys([*_SWITCHES, *_LATER]))
"""Names of all variants; ``plain`` extends nothing."""

UNPUBLISHED = {
    "window": "the code of Qwen v1 was published without window attention, and the windows of its layers were not "
    "published (QwenLM/Qwen issue 422)",
}
"""Variants of the table that was published for Qwen v1 which cannot be computed -> why."""

# What a kind of scaling adds to rope_parameters.
_SCALING = (
    "rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip


class Variants:
    """The variants of a checkpoint, and of an adapter's base.

    Args:
        folder: of the checkpoint.
        adapter: folder of the adapter.
        yarn: of ``--rope_scaling``; without it that of the adapter's training, or of config.json.

    Attributes:
        names: those that the checkpoint has.

    Raises:
        ConfigError: ``--rope_scaling`` with rotary embeddings that are scaled already, or in a way that is no variant.
    """

    def __init__(self, folder: Path, adapter: str | None = None, yarn: Yarn | None = None) -> None:
        from loading.checkpoint import load_config

        self._folder, self._config = folder, load_config(folder)
        self._yarn, self._kind = yarn, "default"
        if self._config.model_type == "qwen":
            self.names: tuple[str, ...] = tuple(_SWITCHES)
        else:
            self._kind = str(self._config.rope_parameters["rope_type"])
            self._yarn = yarn or (None if adapter is None else load_yarn(Path(adapter)))
            self.names = _LATER if self._yarn or self._kind == "yarn" else _LATER[:-1]
        if yarn is not None and (fault := find_yarn_fault(self._config.to_dict())):
            raise ConfigError(f"--rope_scaling yarn: {fault}", "Leave out --rope_scaling")
        if self._kind not in ("default", "dynamic", "yarn"):
            what = f"{folder / 'config.json'} scales the rotary embeddings by {self._kind!r}, which is no variant here"
            raise ConfigError(what, "Give the checkpoint without the scaling")

    def check(self, names: Sequence[str]) -> None:
        """Check that the checkpoint has variants.

        Raises:
            ConfigError: names one that it lacks.
        """
        for name in names:
            if name in self.names:
                continue
            if name == "yarn" and self._config.model_type != "qwen":
                raise ConfigError("--variants yarn needs a factor", "Give --rope_scaling yarn --rope_factor, such as 4")
            kind = architecture_of(self._config.model_type).display_name
            what = f"--variants {name}: {kind} ({self._folder}) has no {name}"
            raise ConfigError(what, f"Its variants are {', '.join(self.names)}")

    def config(self, name: str) -> Any:
        """Return transformers' config of a variant.

        Raises:
            ConfigError: a value of config.json that the variant needs is missing.
        """
        from loading.checkpoint import load_config

        config = copy.deepcopy(self._config)
        if config.model_type == "qwen":
            config.use_dynamic_ntk, config.use_logn_attn = _SWITCHES[name]
            if any(_SWITCHES[name]):
                config.trained_length()
            return config
        if (name, self._kind) in (("ntk", "dynamic"), ("yarn", "yarn")):
            return config
        if name == "yarn":
            return load_config(self._folder, self._yarn)
        rope = config.rope_parameters
        rest = {key: value for key, value in rope.items() if key not in _SCALING}
        config.max_position_embeddings = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        config.rope_parameters = {**rest, **(DYNAMIC_NTK if name == "ntk" else {"rope_type": "default"})}
        return config

    def settings(self, name: str | None = None) -> dict[str, Any]:
        """Return the values of config.json that make a variant, or that all variants are made of."""
        config = self._config if name is None else self.config(name)
        if config.model_type == "qwen":
            switches = (
                {} if name is None else {key: getattr(config, key) for key in ("use_dynamic_ntk", "use_logn_attn")}
            )
            return {"seq_length": config.seq_length, "rotary_emb_base": config.rotary_emb_base, **switches}
        yarn = {"yarn": asdict(self._yarn)} if name is None and self._yarn else {}
        return {key: getattr(config, key) for key in ("max_position_embeddings", "rope_parameters")} | yarn


def use_variant(model: Any, config: Any) -> None:
    """Let a model in memory read by the config of a variant.

    Args:
        model: without wrappers, in evaluation mode.
    """
    if config.model_type == "qwen":
        model.config.use_dynamic_ntk, model.config.use_logn_attn = config.use_dynamic_ntk, config.use_logn_attn
        return
    # A new module, because transformers' dynamic one keeps the longest length that it has seen.
    decoder = model.base_model
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(model.device)
