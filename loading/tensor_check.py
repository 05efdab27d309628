"""Comparison of a checkpoint's tensors with its architecture, before anything is computed with them.

A tensor that is missing would be initialised at random, and one that the model does not have would be dropped by
training and by every export. Only headers are read, and vectors whose values decide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

from checkpoints.source import TensorSource, row_blocks
from checkpoints.whole import load_text_config
from errors import ConfigError
from loading.opening import library_errors
from qwen_model.architectures import ARCHITECTURES, HEAD_WEIGHT, Architecture, is_computed
from qwen_model.lean_models import build_on_meta, model_class_of

_LAYERS = "num_hidden_layers"
_SHOWN = 3  # names of each kind in a message

Shapes = Mapping[str, tuple[int, ...]]


def check_tensors(folder: Path, source: TensorSource) -> None:
    """Check that a checkpoint has exactly the tensors of the model in its config.json, in shape and kind of dtype.

    Tables that every model computes, biases of zeros and a copy of a tied head may be stored as well. The tensors of
    model types that are not in the table of architectures are not known: these pass.

    Args:
        source: the tensors of the folder by the names of the unquantised model, see ``open_dequantized``.

    Raises:
        ConfigError: tensors that are missing, not part of the model, or of another shape or dtype.
    """
    config = load_text_config(folder)
    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    if architecture is None:
        return
    with library_errors(str(folder), "Copy config.json again from the original checkpoint"):
        faults = _layer_faults(config, architecture, source) or _tensor_faults(config, architecture, source)
    if faults:
        fix = "Copy config.json and all weight files again from the original checkpoint"
        raise ConfigError(f"{folder}: its weights are not those of its config.json: {'; '.join(faults)}", fix)


def _layer_faults(config: Mapping[str, Any], architecture: Architecture, source: TensorSource) -> list[str]:
    """Compare the number of layers first: it needs no model, which could be of any size."""
    numbers = (re.match(rf"{re.escape(architecture.blocks)}\.(\d+)\.", name) for name in source.names())
    stored = {int(match[1]) for match in numbers if match}
    declared = config.get(_layers_key(config, architecture), _config_class(architecture).num_hidden_layers)
    if stored and len(stored) == declared == max(stored) + 1:
        return []
    first = next(number for number in count() if number not in stored)
    found = f"{len(stored)}, the first that is missing is {architecture.blocks}.{first}"
    if isinstance(declared, int) and declared <= first:
        found = f"{len(stored)}, also {architecture.blocks}.{max(stored)}" if stored else "0"
    return [f"config.json has {declared} layers ({_LAYERS}), the weights have {found}"]


def _config_class(architecture: Architecture) -> Any:
    return model_class_of(architecture.model_type).config_class


def _layers_key(config: Mapping[str, Any], architecture: Architecture) -> str:
    """Return the key of the number of layers, which has another name in old configs."""
    names = [alias for alias, name in _config_class(architecture).attribute_map.items() if name == _LAYERS]
    return next((name for name in names if name in config), _LAYERS)


def _tensor_faults(config: Mapping[str, Any], architecture: Architecture, source: TensorSource) -> list[str]:
    """Compare names, shapes and dtypes."""
    kinds = _kinds_of_layers(config, architecture)
    of_kinds, shapes, tied = _shapes_of_kinds(config, architecture, kinds)
    for layer, kind in enumerate(kinds):
        shapes |= {f"{architecture.blocks}.{layer}.{name}": shape for name, shape in of_kinds[kind].items()}
    names = source.names()
    if fault := _kind_fault(kinds, of_kinds, architecture, names):
        return [fault]
    faults = []
    if missing := [name for name in shapes if name not in source]:
        faults.append(f"{len(missing)} tensors are missing: {_listed(missing)}")
    others = [name for name in names if name not in shapes and not _is_harmless(name, shapes, source)]
    if tied and HEAD_WEIGHT in others:
        others.remove(HEAD_WEIGHT)
        if not _are_equal(source, HEAD_WEIGHT, architecture.embedding_weight):
            embedding = architecture.embedding_weight
            faults.append(f"{HEAD_WEIGHT} differs from {embedding}, but tie_word_embeddings is true")
    if others:
        faults.append(f"{len(others)} tensors are not part of a {architecture.display_name} model: {_listed(others)}")
    present = [name for name in shapes if name in source]
    wrong = [f"{name} {list(source.shape(name))}" for name in present if source.shape(name) != shapes[name]]
    if wrong:
        needed = list(shapes[wrong[0].partition(" ")[0]])
        faults.append(f"{len(wrong)} tensors have another shape: {_listed(wrong)}; the first needs {needed}")
    dtypes = {name: source.dtype(name) for name in present}
    if integers := [
        f"{name} is stored as {str(dtype).removeprefix('torch.')}"
        for name, dtype in dtypes.items()
        if not dtype.is_floating_point
    ]:
        faults.append(_listed(integers))
    return faults


def _kinds_of_layers(config: Mapping[str, Any], architecture: Architecture) -> list[str]:
    """Return what each layer has in ``layer_types``; of a model without them, whose layers are alike, a common name."""
    values = {name: value for name, value in config.items() if name != "quantization_config"}
    settings = _config_class(architecture).from_dict(values)
    return list(getattr(settings, "layer_types", None) or [""] * settings.num_hidden_layers)


def _shapes_of_kinds(
    config: Mapping[str, Any], architecture: Architecture, kinds: Sequence[str]
) -> tuple[dict[str, dict[str, tuple[int, ...]]], dict[str, tuple[int, ...]], bool]:
    """Build a layer of each kind.

    Returns:
        The shapes of a layer's tensors by its kind, those outside of the layers, and whether the head is tied.
    """
    different = list(dict.fromkeys(kinds))
    types = {"layer_types": different} if different != [""] else {}
    model = build_on_meta({**config, _layers_key(config, architecture): len(different), **types})
    tied = bool(model.config.tie_word_embeddings)
    of_kinds: dict[str, dict[str, tuple[int, ...]]] = {kind: {} for kind in different}
    others: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(f"{architecture.blocks}."):
            number, _, within = name.removeprefix(f"{architecture.blocks}.").partition(".")
            of_kinds[different[int(number)]][within] = tuple(tensor.shape)
        elif not (tied and name == HEAD_WEIGHT):
            others[name] = tuple(tensor.shape)
    return of_kinds, others, tied


def _kind_fault(
    kinds: Sequence[str], of_kinds: Mapping[str, Shapes], architecture: Architecture, names: Sequence[str]
) -> str:
    """Describe the first layer that has the tensors of another kind than config.json says; empty if there is none."""
    stored: dict[int, set[str]] = {}
    for name in names:
        if match := re.match(rf"{re.escape(architecture.blocks)}\.(\d+)\.(.+)", name):
            stored.setdefault(int(match[1]), set()).add(match[2])
    for layer, declared in enumerate(kinds):
        own = stored[layer] - of_kinds[declared].keys()
        for kind, shapes in of_kinds.items():
            if own and own <= shapes.keys() and not shapes.keys() - stored[layer]:
                return f"layer_types of config.json has {declared} for layer {layer}, its tensors are those of {kind}"
    return ""


def _is_harmless(name: str, shapes: Shapes, source: TensorSource) -> bool:
    """Return whether a model computes the same without a tensor that it does not have."""
    if is_computed(name):
        return True
    layer, _, part = name.rpartition(".")
    matrix = shapes.get(f"{layer}.weight", ())
    return part == "bias" and len(matrix) == 2 and not source.read(name).any()


def _are_equal(source: TensorSource, first: str, second: str) -> bool:
    if second not in source or source.shape(first) != source.shape(second):
        return False
    rows, width = source.shape(first)
    blocks = row_blocks(rows, width)
    return all(torch.equal(source.rows(first, *block), source.rows(second, *block)) for block in blocks)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
