"""Flags of older command lines that the installed transformers has renamed or removed.

Each keeps its meaning: it becomes the current flag, is ignored if it has no effect here, or is refused with the reason.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from errors import ConfigError
from training.config.config_file import Setting
from training.config.flags import Flag, flag_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Renamed:
    """An old flag with a successor.

    Attributes:
        new: the current flag.
        annotation: type of the old flag's values, if it differs from the new flag's.
        translate: old value -> new value, or ``None`` to leave the new flag alone.
    """

    new: str
    annotation: str = ""
    translate: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Retired:
    """An old flag without a successor.

    Attributes:
        annotation: type of its values.
        harmless: values that are accepted and ignored; ``None`` for all values.
        reason: why it is ignored or refused.
    """

    annotation: str
    harmless: tuple[Any, ...] | None
    reason: str


def _warmup_steps(ratio: float) -> float:
    """Return ``--warmup_ratio`` as ``--warmup_steps``: below 1 a fraction of all steps, but 1 would be one step."""
    if not 0 <= ratio <= 1:
        raise ValueError("expected a number from 0 to 1")
    return math.nextafter(1.0, 0.0) if ratio == 1 else ratio


_AUTOCAST = "mixed precision always uses torch's autocast"
_FSDP2 = "FSDP2 (--fsdp) shards each block of the model by itself"
OLD_FLAGS: dict[str, Renamed | Retired] = {
    "evaluation_strategy": Renamed("eval_strategy"),
    "warmup_ratio": Renamed("warmup_steps", "float", _warmup_steps),
    "group_by_length": Renamed("train_sampling_strategy", "bool", lambda value: "group_by_length" if value else None),
    "no_cuda": Renamed("use_cpu"),
    "per_gpu_train_batch_size": Renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Renamed("per_device_eval_batch_size"),
    "adafactor": Renamed("optim", "bool", lambda value: "adafactor" if value else None),
    "torchdynamo": Renamed("torch_compile_backend"),
    "xpu_backend": Renamed("ddp_backend"),
    "push_to_hub_model_id": Renamed("hub_model_id"),
    "push_to_hub_token": Renamed("hub_token"),
    # The newest transformers renames these; here the established names stay.
    "activation_checkpointing": Renamed("gradient_checkpointing"),
    "activation_checkpointing_kwargs": Renamed("gradient_checkpointing_kwargs"),
    "save_safetensors": Retired(
        "bool", (True,), "weights are saved as safetensors only, because reading a pickle can run code"
    ),
    "use_mps_device": Retired("bool", None, "an Apple GPU is used if there is one"),
    "fp16_backend": Retired("str", ("auto", "amp", "cuda_amp"), _AUTOCAST),
    "half_precision_backend": Retired("str", ("auto", "amp", "cuda_amp", "cpu_amp"), _AUTOCAST),
    "fp16_opt_level": Retired("str", None, _AUTOCAST),
    "tpu_num_cores": Retired("int | None", None, "TPUs are not supported"),
    "tpu_metrics_debug": Retired("bool", None, "TPUs are not supported"),
    "use_ipex": Retired("bool", (False,), "transformers no longer supports it"),
    "jit_mode_eval": Retired("bool", (False,), "transformers no longer traces models"),
    "past_index": Retired("int", (-1,), "no model here passes state from one batch to the next"),
    "mp_parameters": Retired("str", ("",), "transformers no longer supports SageMaker's model parallelism"),
    "sharded_ddp": Retired("str", ("", "False"), "transformers no longer supports fairscale"),
    "fsdp_min_num_params": Retired("int", (0,), _FSDP2),
    "fsdp_transformer_layer_cls_to_wrap": Retired("str | None", (None,), _FSDP2),
    "include_inputs_for_metrics": Retired("bool", None, "no metric here reads inputs"),
    "include_tokens_per_second": Retired("bool", None, "it is always logged"),
    "use_legacy_prediction_loop": Retired("bool", (False,), "transformers has only one evaluation loop"),
    "ray_scope": Retired("str", None, "hyperparameter search is not supported"),
    "dispatch_batches": Retired("bool | None", (None, False), "each process reads its own batches"),
    "split_batches": Retired("bool | None", (None, False), "a batch is that of one process"),
    "push_to_hub_organization": Retired("str | None", None, "results are not pushed to a hub"),
}


def old_flags(known: dict[str, Flag]) -> dict[str, Flag]:
    """Return the old names that are not in ``known``, as flags."""
    flags = {}
    for name, old in OLD_FLAGS.items():
        if name in known:
            continue
        if isinstance(old, Retired):
            flags[name] = flag_of(name, old.annotation, help=f"retired: {old.reason}")
        else:
            new = known[old.new]
            flag = flag_of(name, old.annotation) if old.annotation else new
            flags[name] = Flag(
                name, flag.kinds, None, f"replaced by --{old.new}", flag.choices, flag.optional, flag.bare
            )  # fmt: skip
    return flags


def translate_old_flags(settings: dict[str, Setting], old: dict[str, Flag]) -> dict[str, Setting]:
    """Replace old names by current ones, and drop those without effect.

    Args:
        settings: converted values.

    Raises:
        ConfigError: both names of a flag are given, or an old flag asks for something that no longer exists.
    """
    translated = {name: setting for name, setting in settings.items() if name not in old}
    old_name_of: dict[str, str] = {}
    for name, (value, where) in settings.items():
        if name not in old:
            continue
        prefix, rule = f"{where}: " if where else "", OLD_FLAGS[name]
        if isinstance(rule, Retired):
            if rule.harmless is not None and value not in rule.harmless:
                raise ConfigError(f"{prefix}--{name} {value} is not supported: {rule.reason}", f"Remove --{name}")
            logger.info("--%s has no effect: %s", name, rule.reason)
            continue
        try:
            value = rule.translate(value)
        except ValueError as error:
            raise ConfigError(f"{prefix}--{name} {value}: {error}") from error
        if value is None:
            continue
        if rule.new in translated:
            other = old_name_of.get(rule.new, rule.new)
            raise ConfigError(f"{prefix}--{name} and --{other} are the same flag", "Give one of them")
        translated[rule.new], old_name_of[rule.new] = Setting(value, where), name
    return translated
