"""Every ``--optim``: what it needs, which ``--optim_args`` it reads, and which other flags it does not read.

transformers finds all of this out after the model has been loaded, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")

# Kinds of arguments: the values that a text is accepted as.
Kind = str | tuple[str, ...]


@dataclass(frozen=True)
class Optimizer:
    """Requirements of an optimizer.

    Attributes:
        refused: why it cannot be used here; empty if it can.
        package: the package to install, and the module it is imported from; empty for torch and transformers.
        needs_gpu: works on CUDA devices only.
        compiles: compiles its update, for which torch's inductor is needed.
        needs_targets: trains the layers of ``--optim_target_modules`` in its own way.
        arguments: names and kinds of ``--optim_args``: ``float``, ``int``, ``bool``, ``true`` (a bool that is on
            whatever its value) or the accepted words.
        ignores: flags without effect on it.
    """

    refused: str = ""
    package: tuple[str, str] = ("", "")
    needs_gpu: bool = False
    compiles: bool = False
    needs_targets: bool = False
    arguments: Mapping[str, Kind] = field(default_factory=dict)
    ignores: tuple[str, ...] = ()


_DTYPES = ("float32", "bfloat16", "float16")
_BITSANDBYTES = Optimizer(package=("bitsandbytes", "bitsandbytes"), needs_gpu=True)
_ADEMAMIX = Optimizer(
    package=("bitsandbytes", "bitsandbytes"),
    needs_gpu=True,
    arguments={
        **dict.fromkeys(("beta1", "beta2", "beta3", "alpha", "eps"), "float"),
        **dict.fromkeys(("t_alpha", "t_beta3"), "int"),
    },
)
_RMSPROP_BITSANDBYTES = Optimizer(package=("bitsandbytes", "bitsandbytes"), needs_gpu=True, ignores=_ADAM)
_LION = Optimizer(package=("bitsandbytes", "bitsandbytes"), needs_gpu=True, ignores=("adam_epsilon",))
# block_size would reach it as text.
_TORCHAO = Optimizer(package=("torchao", "torchao"), compiles=True, arguments={"bf16_stochastic_round": "bool"})
_GALORE = Optimizer(
    package=("galore-torch", "galore_torch"),
    needs_targets=True,
    arguments={"rank": "int", "update_proj_gap": "int", "scale": "float",
               "proj_type": ("std", "reverse_std", "right", "left", "full")},
    ignores=(*_ADAM, "weight_decay"),
)  # fmt: skip
_APOLLO = Optimizer(
    package=("apollo-torch", "apollo_torch"),
    needs_targets=True,
    arguments={"rank": "int", "update_proj_gap": "int", "scale": "float", "proj": ("random", "svd"),
               "scale_type": ("channel", "tensor"), "proj_type": ("std", "reverse_std", "right", "left")},
    ignores=("weight_decay",),
)  # fmt: skip
_WITHIN_BACKWARD = Optimizer(
    "it updates parameters within the backward pass, so gradients cannot be clipped, accumulated or checked for NaN, "
    "and a checkpoint lacks its state"
)
_SCHEDULE_FREE = {"weight_lr_power": "float", "r": "float"}

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch": Optimizer(),
    "adamw_torch_fused": Optimizer(),
    "adamw_torch_xla": Optimizer("TPUs are not supported"),
    "adamw_torch_npu_fused": Optimizer("NPUs are not supported"),
    "adafactor": Optimizer(ignores=_ADAM),
    "adamw_anyprecision": Optimizer("torchdistx, its package, is for torch 1 only"),
    "adamw_torch_4bit": _TORCHAO,
    "adamw_torch_8bit": _TORCHAO,
    "ademamix": _ADEMAMIX,
    "ademamix_8bit": _ADEMAMIX,
    "paged_ademamix_32bit": _ADEMAMIX,
    "paged_ademamix_8bit": _ADEMAMIX,
    # weight_decay comes from --weight_decay, parameter group by parameter group.
    "sgd": Optimizer(arguments={"momentum": "float", "dampening": "float", "nesterov": "bool"}, ignores=_ADAM),
    "adagrad": Optimizer(arguments={"lr_decay": "float", "eps": "float"}, ignores=_ADAM),
    "rmsprop": Optimizer(
        arguments={"momentum": "float", "alpha": "float", "eps": "float", "centered": "bool"}, ignores=_ADAM
    ),
    "adamw_bnb_8bit": _BITSANDBYTES,
    "adamw_8bit": _BITSANDBYTES,
    "paged_adamw_32bit": _BITSANDBYTES,
    "paged_adamw_8bit": _BITSANDBYTES,
    "lion_8bit": _LION,
    "lion_32bit": _LION,
    "paged_lion_32bit": _LION,
    "paged_lion_8bit": _LION,
    "rmsprop_bnb": _RMSPROP_BITSANDBYTES,
    "rmsprop_bnb_8bit": _RMSPROP_BITSANDBYTES,
    "rmsprop_bnb_32bit": _RMSPROP_BITSANDBYTES,
    "galore_adamw": _GALORE,
    "galore_adamw_8bit": Optimizer(**{**vars(_GALORE), "needs_gpu": True}),
    "galore_adafactor": _GALORE,
    "galore_adamw_layerwise": _WITHIN_BACKWARD,
    "galore_adamw_8bit_layerwise": _WITHIN_BACKWARD,
    "galore_adafactor_layerwise": _WITHIN_BACKWARD,
    "lomo": _WITHIN_BACKWARD,
    "adalomo": _WITHIN_BACKWARD,
    "grokadamw": Optimizer(
        package=("grokadamw", "grokadamw"),
        arguments=dict.fromkeys(
            ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"), "float"
        ),
        ignores=_ADAM,
    ),
    "schedule_free_radam": Optimizer(package=("schedulefree", "schedulefree"), arguments=_SCHEDULE_FREE),
    "schedule_free_adamw": Optimizer(package=("schedulefree", "schedulefree"), arguments=_SCHEDULE_FREE),
    "schedule_free_sgd": Optimizer(package=("schedulefree", "schedulefree"), arguments=_SCHEDULE_FREE, ignores=_ADAM),
    "apollo_adamw": _APOLLO,
    "apollo_adamw_layerwise": _WITHIN_BACKWARD,
    "stable_adamw": Optimizer(
        package=("torch-optimi", "optimi"), arguments={"max_lr": "float", "kahan_sum": "true", "decouple_lr": "true"}
    ),
}
