"""The adapters of an engine: which rows can share a batch, and which adapter each row of a step uses.

Plain adapters and the base share one batch: peft computes each adapter for its own rows. What peft refuses or mixes up
there (DoRA, trained embeddings and heads, trained token rows) runs in a batch of its own, in turn with the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft.tuners.lora.layer import LoraLayer

from checkpoints.adapter_config import load_adapter_config
from errors import ConfigError

_BASE = "__base__"  # peft's name for rows without an adapter
_ALONE = ("use_dora", "modules_to_save", "trainable_token_indices")

Group = str | None
"""Rows of one group can share a batch: ``None``, or the name of an adapter that runs alone."""


def loading_order(folders: Mapping[str, str]) -> dict[str, str]:
    """Return adapters in the order in which peft can load them: those with trained token rows last.

    Args:
        folders: of the adapters, by the names that requests use.

    Raises:
        ConfigError: a folder without an adapter, one that changes the base for the others, or two that
            exclude each other.
    """
    settings = {name: load_adapter_config(Path(folder), "--adapter") for name, folder in folders.items()}
    for name, options in settings.items():
        if options.get("bias") not in (None, "none"):
            raise ConfigError(
                f"--adapter {name} has trained biases, which would change the base and other adapters, too",
                "Merge it with merge_lora.py, and load the result",
            )
    whole, rows = ([name for name, options in settings.items() if options.get(each)] for each in _ALONE[1:])
    if whole and rows:
        what = f"--adapter {whole[0]} has trained embeddings, {rows[0]} trained rows of them: peft cannot load both"
        raise ConfigError(what, "Load them one at a time, or merge one with merge_lora.py")
    return {name: folders[name] for name in sorted(folders, key=lambda name: name in rows)}


class Adapters:
    """The adapters of a model.

    Args:
        model: peft's, with these adapters, or a base without any.
        names: the adapters' names in the model, by the names that requests use.
    """

    def __init__(self, model: Any, names: Mapping[str, str]) -> None:
        self._model = model
        self._names = dict(names)
        self.alone = {name for name, inner in names.items() if any(self._setting(inner, each) for each in _ALONE)}
        self._rows: list[str] | None = None
        self._active: object = self  # no group yet
        if names:
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    hooked: Any = module
                    hooked.register_forward_pre_hook(self._add_names, with_kwargs=True)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def group_of(self, adapter: str | None) -> Group:
        """Return the group of a request's adapter."""
        return adapter if adapter in self.alone else None

    def use(self, group: Group, adapters: Sequence[str | None]) -> None:
        """Let the next forward pass use the adapter of each row, which are all of one group."""
        if not self._names:
            return
        if group != self._active:
            self._activate(group)
            self._active = group
        # peft computes a batch without any adapter like one with other rows.
        self._rows = None if group is not None else [self._names[each] if each else _BASE for each in adapters]

    def _activate(self, group: Group) -> None:
        shared = [inner for name, inner in self._names.items() if name not in self.alone]
        inner = self._names[group] if group is not None else shared[0] if shared else None
        if inner is None:
            self._model.base_model.disable_adapter_layers()
            return
        self._model.base_model.enable_adapter_layers()
        self._model.set_adapter(inner, inference_mode=True)

    def _add_names(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs if self._rows is None else {**kwargs, "adapter_names": self._rows}

    def _setting(self, inner: str, name: str) -> Any:
        return getattr(self._model.peft_config[inner], name, None)
