"""The engine that lets several processes train one model: DDP, DeepSpeed ZeRO or FSDP2.

Imports no torch, so that an invalid config is refused before anything is loaded. ``training.engine_checks`` compares
the engine's config with the other arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import ConfigError
from processes import count_processes


@dataclass(frozen=True)
class Engine:
    """Parallelism of a run: its engine, and the engine's config.

    Attributes:
        name: ``none`` (one process), ``ddp``, ``zero0`` to ``zero3``, or ``fsdp2``.
        config: the given config of DeepSpeed or FSDP.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def is_deepspeed(self) -> bool:
        return self.name.startswith("zero")

    @property
    def shards_parameters(self) -> bool:
        """Return whether a process holds only its shard of every parameter."""
        return self.name in ("zero3", "fsdp2")

    @property
    def title(self) -> str:
        """The name for messages."""
        names = {"none": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}
        title = names.get(self.name) or f"DeepSpeed ZeRO-{self.name[-1]}"
        zero = self.config.get("zero_optimization", {})
        offloaded = [part for part in ("optimizer", "param") if _device(zero.get(f"offload_{part}")) != "none"]
        return f"{title} with offloading" if offloaded or self.config.get("cpu_offload") else title


def find_engine(flags: Mapping[str, Any]) -> Engine:
    """Return the engine of ``--deepspeed`` or ``--fsdp``; without them DDP if the run has several processes.

    Args:
        flags: transformers' flags; defaults may be left out.

    Raises:
        ConfigError: a config that cannot be read, or an unsupported ZeRO stage or FSDP version.
    """
    deepspeed, fsdp = flags.get("deepspeed"), flags.get("fsdp")
    if is_set(deepspeed):
        config = _load_config("--deepspeed", deepspeed)
        zero = config.get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, dict) else None
        if stage not in (0, 1, 2, 3):
            raise ConfigError(
                f"--deepspeed {show_config(deepspeed)}: zero_optimization.stage is {stage!r}", "Give 1, 2 or 3"
            )
        return Engine(f"zero{stage}", config)
    if is_set(fsdp):
        value = flags.get("fsdp_config")
        config = {} if value is None else _load_config("--fsdp_config", value)
        config = {name.removeprefix("fsdp_"): setting for name, setting in config.items()}
        if str(config.get("version", 2)) != "2":
            raise ConfigError(
                f"--fsdp_config {show_config(value)}: version {config['version']} is not supported",
                'Give "version": 2',
            )
        return Engine("fsdp2", config)
    return Engine("ddp" if count_processes() > 1 else "none")


def is_set(value: Any) -> bool:
    """Return whether ``--deepspeed`` or ``--fsdp`` selects an engine."""
    return value not in (None, "", False, "False", "false", [])


def show_config(value: Any) -> str:
    """Return a config's path, or the object itself as JSON, for messages."""
    return value if isinstance(value, str) else json.dumps(value)


def _load_config(flag: str, value: Any) -> dict[str, Any]:
    """Return a config given as a file, as JSON text, or as an object in a file of flags."""
    if isinstance(value, dict):
        return value
    where = f"{flag} {value}"
    try:
        config = json.loads(value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{where}: cannot be read ({error.strerror})", "finetune/ contains configs to start from"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error})", "Correct it, or use a config from finetune/") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{where}: not a JSON object", "Use a config from finetune/")
    return config


def _device(offload: Any) -> str:
    return str(offload.get("device", "none")) if isinstance(offload, dict) else "none"
