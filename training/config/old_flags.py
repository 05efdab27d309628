"""Flags that stand in people's scripts although the installed transformers dropped or renamed them.

Each keeps meaning what it meant: it becomes the flag of today, or is accepted where it had no effect here, or is
refused with the reason where what it asked for is gone.
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
class Translated:
    """An old flag that becomes another one.

    Attributes:
        new: the flag of today.
        annotation: what its values are, where that is not what the new flag's are.
        translate: value of the old flag -> value of the new one, ``None`` where the new one is left alone.
    """

    new: str
    annotation: str = ""
    translate: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Retired:
    """An old flag without a successor.

    Attributes:
        harmless: the values that asked for nothing; ``None`` where no value had an effect here.
        reason: why it is accepted without an effect, or refused.
    """

    annotation: str
    harmless: tuple[Any, ...] | None
    reason: str


def _share(ratio: float) -> float:
    """``warmup_steps`` below 1 is a share of all steps; 1 would be one step, so the whole is the number before it."""
    if not 0 <= ratio <= 1:
        raise ValueError("a share from 0 to 1 is wanted")
    return math.nextafter(1.0, 0.0) if ratio == 1 else ratio


_OF_AUTOCAST = "mixed precision is torch's own autocast"
_OF_FSDP = "FSDP is not available yet"
OLD_FLAGS: dict[str, Translated | Retired] = {
    "evaluation_strategy": Translated("eval_strategy"),
    "warmup_ratio": Translated("warmup_steps", "float", _share),
    "group_by_length": Translated(
        "train_sampling_strategy", "bool", lambda value: "group_by_length" if value else None
    ),
    "no_cuda": Translated("use_cpu"),
    "per_gpu_train_batch_size": Translated("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Translated("per_device_eval_batch_size"),
    "adafactor": Translated("optim", "bool", lambda value: "adafactor" if value else None),
    "torchdynamo": Translated("torch_compile_backend"),
    "xpu_backend": Translated("ddp_backend"),
    "push_to_hub_model_id": Translated("hub_model_id"),
    "push_to_hub_token": Translated("hub_token"),
    # New names of the newest transformers, whose old ones everybody knows.
    "activation_checkpointing": Translated("gradient_checkpointing"),
    "activation_checkpointing_kwargs": Translated("gradient_checkpointing_kwargs"),
    "save_safetensors": Retired(
        "bool", (True,), "weights are only saved as safetensors, because a pickle can run code when it is read"
    ),
    "use_mps_device": Retired("bool", None, "an Apple GPU is used where there is one"),
    "fp16_backend": Retired("str", ("auto", "amp", "cuda_amp"), _OF_AUTOCAST),
    "half_precision_backend": Retired("str", ("auto", "amp", "cuda_amp", "cpu_amp"), _OF_AUTOCAST),
    "fp16_opt_level": Retired("str", None, _OF_AUTOCAST),
    "tpu_num_cores": Retired("int | None", None, "there is no training on a TPU"),
    "tpu_metrics_debug": Retired("bool", None, "there is no training on a TPU"),
    "use_ipex": Retired("bool", (False,), "transformers no longer works with that library"),
    "jit_mode_eval": Retired("bool", (False,), "transformers no longer traces models"),
    "past_index": Retired("int", (-1,), "no model here has a state that one batch hands to the next"),
    "mp_parameters": Retired("str", ("",), "transformers no longer works with SageMaker's model parallelism"),
    "sharded_ddp": Retired("str", ("", "False"), "transformers no longer works with fairscale"),
    "fsdp_min_num_params": Retired("int", (0,), _OF_FSDP),
    "fsdp_transformer_layer_cls_to_wrap": Retired("str | None", (None,), _OF_FSDP),
    "include_inputs_for_metrics": Retired("bool", None, "no metric here reads inputs"),
    "include_tokens_per_second": Retired("bool", None, "it is always logged"),
    "use_legacy_prediction_loop": Retired("bool", (False,), "transformers has one loop left"),
    "ray_scope": Retired("str", None, "there is no hyperparameter search here"),
    "dispatch_batches": Retired("bool | None", (None, False), "--accelerator_config '{\"dispatch_batches\": true}'"),
    "split_batches": Retired("bool | None", (None, False), "--accelerator_config '{\"split_batches\": true}'"),
    "push_to_hub_organization": Retired("str | None", (None,), "--hub_model_id ORGANIZATION/NAME names it"),
}


def old_flags(known: dict[str, Flag]) -> dict[str, Flag]:
    """The old names that the known flags lack, as flags."""
    flags = {}
    for name, old in OLD_FLAGS.items():
        if name in known:
            continue
        if isinstance(old, Retired):
            flags[name] = flag_of(name, old.annotation, help=f"old: {old.reason}")
        else:
            new = known[old.new]
            flag = flag_of(name, old.annotation) if old.annotation else new
            flags[name] = Flag(
                name, flag.kinds, None, f"old name of --{old.new}", flag.choices, flag.optional, flag.bare
            )  # fmt: skip
    return flags


def translate_old_flags(settings: dict[str, Setting], old: dict[str, Flag]) -> dict[str, Setting]:
    """Settings (converted already) with today's names only.

    Raises:
        ConfigError: an old and a new name of the same thing, or an old flag whose effect is gone.
    """
    translated = {name: setting for name, setting in settings.items() if name not in old}
    origin: dict[str, str] = {}
    for name, (value, where) in settings.items():
        if name not in old:
            continue
        place, rule = f"{where}: " if where else "", OLD_FLAGS[name]
        if isinstance(rule, Retired):
            if rule.harmless is not None and value not in rule.harmless:
                raise ConfigError(f"{place}--{name} {value} is not possible: {rule.reason}", "Leave it out")
            logger.info("--%s has no effect: %s", name, rule.reason)
            continue
        try:
            value = rule.translate(value)
        except ValueError as error:
            raise ConfigError(f"{place}--{name} {value}: {error}") from error
        if value is None:
            continue
        if rule.new in translated:
            other = origin.get(rule.new, rule.new)
            raise ConfigError(f"{place}--{name} and --{other} are the same thing", "Give one of the two")
        translated[rule.new], origin[rule.new] = Setting(value, where), name
    return translated
