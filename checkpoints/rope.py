"""Rotary embeddings that reach over more positions than a model was trained with, YaRN above all; needs no torch.

``--rope_scaling`` sets YaRN in the config that a run loads its model with, and the results of the run keep it: in
config.json of a model, in a file of its own beside an adapter, whose base is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints.files import is_file, load_json, save_json
from checkpoints.names import BASE_ROPE
from checkpoints.whole import has_other_parts, text_config, with_text_config
from errors import ConfigError

# The base's multiplier in transformers' dynamic NTK equals Qwen v1's at 2, 4, 8... times the trained length.
DYNAMIC_NTK = {"rope_type": "dynamic", "factor": 2.0}

MOST_FACTOR = 1000
MOST_POSITIONS = 10**8


@dataclass(frozen=True)
class Yarn:
    """The scaling of a model's rotary embeddings.

    Attributes:
        factor: the positions afterwards, divided by those before.
        original_max_position_embeddings: the positions before; ``None``: as many as the config has.
    """

    factor: float
    original_max_position_embeddings: int | None = None

    def __str__(self) -> str:
        return f"YaRN, factor {self.factor:g}"


def find_yarn_fault(config: Mapping[str, Any], yarn: Yarn | None = None) -> str:
    """Describe why a model's rotary embeddings cannot be scaled; empty if they can be.

    Args:
        config: contents of config.json, or of the text model's part of it.
        yarn: the scaling of an adapter's training, which the config may have already.
    """
    config = text_config(config)
    if config.get("model_type") == "qwen":
        return "Qwen v1 extends its positions itself (use_dynamic_ntk in config.json)"
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else "default"
        if kind == "yarn" and yarn is not None and isinstance(rope, Mapping):
            found = Yarn(rope.get("factor", 0), rope.get("original_max_position_embeddings"))
            if found == yarn:
                continue
        if kind != "default":
            return f"config.json scales the rotary embeddings already ({key}: {kind})"
    return "" if config.get("max_position_embeddings") else "config.json has no max_position_embeddings"


def with_yarn(config: Mapping[str, Any], yarn: Yarn | None) -> dict[str, Any]:
    """Return a config.json with scaled rotary embeddings, in the forms of transformers 5 and of earlier versions."""
    if yarn is None:
        return dict(config)
    text = text_config(config)
    yarn = resolved(yarn, text)
    original, before = yarn.original_max_position_embeddings, text.get("rope_parameters") or {}
    if original is None:
        return dict(config)
    scaled = {**before, "rope_type": "yarn", "factor": yarn.factor, "original_max_position_embeddings": original}
    changed: dict[str, Any] = {"max_position_embeddings": int(original * yarn.factor)}
    theta = before.get("rope_theta", text.get("rope_theta"))
    if theta is not None:
        changed["rope_parameters"] = scaled | {"rope_theta": theta}
    if not has_other_parts(config):  # earlier versions know these models
        changed["rope_scaling"] = {name: value for name, value in scaled.items() if name != "rope_theta"}
        changed |= {} if theta is None else {"rope_theta": theta}
    return with_text_config(config, text | changed)


def resolved(yarn: Yarn, config: Mapping[str, Any]) -> Yarn:
    """Return a scaling that states the positions before it."""
    original = yarn.original_max_position_embeddings or text_config(config).get("max_position_embeddings")
    return Yarn(yarn.factor, original)


def save_yarn(yarn: Yarn, folder: Path) -> None:
    """Record beside an adapter how the rotary embeddings of its base were scaled in training."""
    save_json(asdict(yarn), folder / BASE_ROPE)


def load_yarn(adapter: Path) -> Yarn | None:
    """Return how the rotary embeddings of an adapter's base were scaled in training; ``None`` if they were not.

    Raises:
        ConfigError: the record cannot be read.
    """
    file = adapter / BASE_ROPE
    return Yarn(**load_json(file)) if is_file(file) else None


def common_yarn(adapters: Iterable[Path], flag: str = "--adapter") -> Yarn | None:
    """Return the scaling that all adapters were trained with.

    Raises:
        ConfigError: they were trained with different ones.
    """
    found = {folder: load_yarn(folder) for folder in adapters}
    if len({*found.values()}) > 1:
        listed = ", ".join(f"{folder} ({yarn or 'unscaled'})" for folder, yarn in found.items())
        what = f"{flag}: the adapters were trained with differently scaled rotary embeddings: {listed}"
        raise ConfigError(what, "One model cannot have both: use them one at a time")
    return next(iter(found.values()), None)
