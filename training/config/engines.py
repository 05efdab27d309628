"""The engine that lets several processes train one model: DDP, DeepSpeed ZeRO or FSDP2.

Imports no torch, so that an invalid config is refused before anything is loaded. ``training.engine_checks`` compares
the engine's config with the other arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoints.json_rules import ANY_TEXT, BOOLEAN, OBJECT, Rule, either, list_of, one_of, shown, table, whole
from errors import ConfigError
from processes import count_processes
from training.config.objects import check_object, load_object

_EXAMPLES = "Correct it, or use a config from finetune/"
_FSDP1 = "FSDP2 needs no such setting"

# Settings of --fsdp_config, without the prefix fsdp_ that they may have.
_FSDP2_SETTINGS: dict[str, Rule] = {
    "version": one_of(2, "2"), "reshard_after_forward": BOOLEAN, "cpu_offload": BOOLEAN,
    "activation_checkpointing": BOOLEAN, "state_dict_type": one_of("FULL_STATE_DICT", "SHARDED_STATE_DICT"),
    "auto_wrap_policy": one_of("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"),
    "transformer_layer_cls_to_wrap": either(ANY_TEXT, list_of(ANY_TEXT, 100)), "min_num_params": whole(0, 10**12),
    "cpu_ram_efficient_loading": Rule("false (leave it out)", lambda value: value is False),
}  # fmt: skip
# Settings of FSDP1, and what FSDP2 does instead.
_FSDP1_SETTINGS = {
    "sharding_strategy": 'FSDP2 shards fully; "reshard_after_forward": false is the former SHARD_GRAD_OP',
    "offload_params": '"cpu_offload": true moves parameters to the host',
    "backward_prefetch": _FSDP1, "backward_prefetch_policy": _FSDP1, "forward_prefetch": _FSDP1,
    "use_orig_params": _FSDP1, "sync_module_states": _FSDP1, "limit_all_gathers": _FSDP1,
    "mixed_precision": "--bf16 decides the precision", "mixed_precision_policy": "--bf16 decides the precision",
    "xla": "TPUs are not supported", "xla_fsdp_v2": "TPUs are not supported", "xla_fsdp_settings": "TPUs are not "
    "supported", "xla_fsdp_grad_ckpt": "TPUs are not supported",
}  # fmt: skip
# Parts of a config of DeepSpeed that this project reads.
_DEEPSPEED_PARTS = table(dict.fromkeys(("zero_optimization", "optimizer", "scheduler", "bf16", "fp16"), OBJECT))


@dataclass(frozen=True)
class Engine:
    """Parallelism of a run: its engine, and the engine's config.

    Attributes:
        name: ``none`` (one process), ``ddp``, ``zero0`` to ``zero3``, or ``fsdp2``.
        config: the given config of DeepSpeed or FSDP.
        given: DeepSpeed's file or object, for messages.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    given: str = field(default="", compare=False)

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


def find_engine(flags: Mapping[str, Any], processes: int | None = None) -> Engine:
    """Return the engine of ``--deepspeed`` or ``--fsdp``; without them DDP if the run has several processes.

    Args:
        flags: transformers' flags; defaults may be left out.
        processes: of the run; ``None``: as the launcher has started.

    Raises:
        ConfigError: a config that cannot be read, or an unsupported ZeRO stage or FSDP version.
    """
    deepspeed, fsdp = flags.get("deepspeed"), flags.get("fsdp")
    if is_set(deepspeed):
        config = load_object("--deepspeed", deepspeed, _EXAMPLES)
        zero = config.get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, dict) else None
        if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
            raise ConfigError(
                f"--deepspeed {show_config(deepspeed)}: zero_optimization.stage is {shown(stage)}", "Give 1, 2 or 3"
            )
        if fault := _DEEPSPEED_PARTS.find_fault(config, ""):
            raise ConfigError(f"--deepspeed {show_config(deepspeed)}: {fault}", _EXAMPLES)
        return Engine(f"zero{int(stage)}", config, show_config(deepspeed))
    if is_set(fsdp):
        value = flags.get("fsdp_config")
        return Engine("fsdp2", {} if value is None else _load_fsdp_config(value))
    return Engine("ddp" if (processes or count_processes()) > 1 else "none")


def _load_fsdp_config(value: Any) -> dict[str, Any]:
    """Return the settings of ``--fsdp_config`` without the prefix that they may have.

    Raises:
        ConfigError: it cannot be read, or a setting is of FSDP1, unknown or of another type.
    """
    flag = f"--fsdp_config {show_config(value)}"
    config = load_object("--fsdp_config", value, _EXAMPLES)
    config = {name.removeprefix("fsdp_"): setting for name, setting in config.items()}
    if str(config.get("version", 2)) != "2":
        raise ConfigError(f"{flag}: version {shown(config['version'])} is not supported", 'Give "version": 2')
    for name, instead in _FSDP1_SETTINGS.items():
        if name in config and config[name] not in (False, None):
            raise ConfigError(f"{flag}: {name} is a setting of FSDP1 or TPUs: {instead}", f"Remove {name}")
    settings = {name: setting for name, setting in config.items() if name not in _FSDP1_SETTINGS}
    for fault in check_object(flag, settings, _FSDP2_SETTINGS):
        raise fault
    return config


def is_set(value: Any) -> bool:
    """Return whether ``--deepspeed`` or ``--fsdp`` selects an engine."""
    return value not in (None, "", False, "False", "false", [])


def show_config(value: Any) -> str:
    """Return a config's path, or the object itself as JSON, for messages."""
    return value if isinstance(value, str) else json.dumps(value)


def _device(offload: Any) -> str:
    return str(offload.get("device", "none")) if isinstance(offload, dict) else "none"
