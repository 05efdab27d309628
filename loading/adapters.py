"""LoRA adapters: attaching a new one, continuing a saved one, and deciding whether the embeddings train."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear, awq, gptq
from transformers import PreTrainedModel

from chat.render import control_ids_of
from checkpoints.adapter_config import load_adapter_config
from checkpoints.input_folders import check_files
from checkpoints.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from checkpoints.patterns import check_patterns
from checkpoints.shards import open_checkpoint
from checkpoints.whole import ADAPTER_PREFIX, LONGER_NAMES, text_options
from errors import ConfigError, one_line
from loading.checkpoint import Checkpoint
from loading.initial_values import begin_as_weights
from loading.lean_dora import use_lean_dora
from loading.opening import library_errors
from loading.token_rows import sharded_token_rows, use_lean_trainable_tokens
from qwen_model.adapter_dropout import use_adapter_dropout
from qwen_model.architectures import architecture_of

logger = logging.getLogger(__name__)

# Initialisations that leave the weights as they are; the others are in `initial_values.py`.
_PEFT_INITS: dict[str, Any] = {"true": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}


@dataclass(frozen=True)
class EmbeddingsPolicy:
    """Trained rows of embedding and head (``full``, ``chatml_tokens``, ``none``), with the reason."""

    mode: str
    reason: str


def embeddings_policy(requested: str, checkpoint: Checkpoint, lora_weight_path: str = "") -> EmbeddingsPolicy:
    """Resolve ``--trainable_embeddings``; a continued adapter keeps its own setting.

    Base models of Qwen v1 were not trained on ``<|im_start|>`` and ``<|im_end|>``: unless their rows train, the model
    cannot learn where an answer ends. generation_config.json contains the kind of model; folder names do not count.
    """
    if lora_weight_path:
        config = load_adapter_config(Path(lora_weight_path), "--lora_weight_path")
        mode = "full" if config.get("modules_to_save") else "none"
        if mode == "none" and config.get("trainable_token_indices"):
            mode = "chatml_tokens"
        if requested not in ("auto", mode):
            raise ConfigError(
                f"--trainable_embeddings {requested}: the adapter of --lora_weight_path was made with {mode}",
                "Leave --trainable_embeddings out, or start a new adapter",
            )
        return EmbeddingsPolicy(mode, f"--lora_weight_path {lora_weight_path}: as in that adapter")
    if requested != "auto":
        return EmbeddingsPolicy(requested, f"--trainable_embeddings {requested}")
    architecture = architecture_of(checkpoint.model_type)
    if architecture.base_knows_chatml and checkpoint.chat_format is None:
        return EmbeddingsPolicy(
            "none", f"auto: {architecture.display_name} checkpoints are trained on the ChatML tokens"
        )
    if checkpoint.chat_format == "chatml":
        return EmbeddingsPolicy("none", "auto: chat_format in generation_config.json is chatml: a chat model")
    return EmbeddingsPolicy(
        "full",
        f"auto: chat_format in generation_config.json is {checkpoint.chat_format!r}: a base model, not trained on the "
        "ChatML tokens",
    )


@dataclass(frozen=True)
class LoraSettings:
    """Hyperparameters of a new adapter.

    Attributes:
        alpha: the adapter's product is scaled by ``alpha / rank``, with ``rslora`` by ``alpha / sqrt(rank)``.
        target_modules: names of linear layers; ``None``: all those of the blocks.
        bias: biases that train: ``none``, ``all`` or ``lora_only``.
        dora: train the norms of the merged weights' rows too.
        init: ``true``, ``gaussian``, ``orthogonal``, or a method of :mod:`loading.initial_values`.
        rank_pattern, alpha_pattern: rank and alpha of the layers that match a name or an expression.
    """

    rank: int = 64
    alpha: int = 16
    dropout: float = 0.05
    target_modules: Sequence[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    rslora: bool = False
    dora: bool = False
    init: str = "true"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)


def attach_lora(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    settings: LoraSettings,
    policy: EmbeddingsPolicy,
    in_float32: bool = True,
) -> PeftModel:
    """Freeze the model and attach a new adapter.

    Args:
        in_float32: train in float32 whatever the model's precision: updates of a few thousandths of a weight vanish
            in bfloat16's eight bits.

    Raises:
        ConfigError: target modules that the model lacks.
    """
    config = _build_config(model, checkpoint, settings, policy)
    with without_gptqmodel(), sharded_token_rows(), drawn_once(), rounded_in_place(in_float32):
        adapted = get_peft_model(model, config, autocast_adapter_dtype=in_float32)
    if settings.init not in _PEFT_INITS:
        begin_as_weights(adapted, settings.init)
    use_lean_dora(modules := list(adapted.modules()), is_new=True)
    return _prepare_for_training(adapted, modules, in_float32)


def continue_lora(model: PreTrainedModel, folder: str, in_float32: bool = True) -> PeftModel:
    """Freeze the model and attach the saved adapter of ``--lora_weight_path``, to be trained further.

    Args:
        in_float32: as in ``attach_lora``.

    Raises:
        ConfigError: the adapter cannot be continued.
    """
    adapted = load_adapter(model, folder, "--lora_weight_path", is_trainable=True, in_float32=in_float32)
    return _prepare_for_training(adapted, list(adapted.modules()), in_float32)


def _prepare_for_training(adapted: PeftModel, modules: Sequence[torch.nn.Module], in_float32: bool) -> PeftModel:
    use_lean_trainable_tokens(modules)
    use_adapter_dropout(modules)
    keep_input_dtype(modules)
    if in_float32:
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return adapted


class _OutsideAutocast:
    """A value that is false under autocast."""

    def __bool__(self) -> bool:
        return not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"))


def keep_input_dtype(modules: Iterable[torch.nn.Module]) -> None:
    """Keep peft from copying the input of every plain adapter to float32 where autocast casts it back for the product.

    Variants of peft compute more than products, for which its float32 is kept.
    """
    for module in modules:
        variants = getattr(module, "lora_variant", {}).values()
        if hasattr(module, "cast_input_dtype_enabled") and all(hasattr(each, "takes_any_dtype") for each in variants):
            module.cast_input_dtype_enabled = _OutsideAutocast()  # type: ignore[assignment]


def load_adapter(
    model: PreTrainedModel | PeftModel,
    folder: str,
    flag: str,
    is_trainable: bool = False,
    in_float32: bool = True,
    name: str = "default",
) -> PeftModel:
    """Attach a saved adapter to its base, or beside the adapters that it has.

    Args:
        flag: the flag that named the folder, for messages.
        name: of the adapter in the model.

    Raises:
        ConfigError: no adapter, an adapter of another model, or one that lacks a LoRA matrix.
    """
    options = load_adapter_config(Path(folder), flag)
    check_files(Path(folder))
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = [module for module, _ in base.named_modules()]
    check_patterns(options, modules, f"{flag} {Path(folder) / ADAPTER_CONFIG}")
    fix = "Give the folder of an adapter of this model"
    with library_errors(f"{flag} {folder}", fix, _describe), without_gptqmodel(), drawn_once():
        reader = open_checkpoint(folder, ADAPTER_WEIGHTS)
        saved = {tensor.replace(".default", "") for tensor in reader.names()}
        if any(reader.stored_name(tensor) != tensor for tensor in reader.names()):
            options = text_options(options, _adapted_modules(saved))
        config = _peft_config(options, folder, flag)  # so that peft does not read the file, with keys of any kind
        settings: dict[str, Any] = {"is_trainable": is_trainable, "autocast_adapter_dtype": in_float32}
        settings["key_mapping"] = LONGER_NAMES
        if isinstance(model, PeftModel):
            adapted = model
            adapted.add_adapter(name, config)
            adapted.load_adapter(folder, name, **settings)
        else:
            adapted = PeftModel.from_pretrained(model, folder, name, config=config, **settings)
    use_lean_dora(adapted.modules())
    # peft initialises tensors that the file lacks.
    state = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    missing = sorted(state.keys() - saved)
    if lora := [name for name in missing if ".lora_" in name]:
        raise ConfigError(f"{flag} {folder}: its file lacks {lora[0]}", "Copy the adapter again, or train a new one")
    if missing:
        logger.warning(
            "%s %s lacks %s, which were trained with it: those of the base are used, and the answers differ from the "
            "trained model's. The original script saved adapters of base models this way.",
            flag,
            folder,
            " and ".join(missing),
        )
    return adapted


def _adapted_modules(saved: Iterable[str]) -> list[str]:
    """Return the modules that the tensors of an adapter are matrices for."""
    parts = (name.removeprefix(ADAPTER_PREFIX).partition(".lora_") for name in saved)
    return sorted({module for module, found, _ in parts if found})


@contextmanager
def drawn_once() -> Iterator[None]:
    """Keep torch from drawing values for new linear layers, all of which peft replaces: most of the time it takes."""
    reset_parameters = torch.nn.Linear.reset_parameters
    setattr(torch.nn.Linear, "reset_parameters", lambda self: None)  # noqa: B010 - mypy refuses to assign a method
    try:
        yield
    finally:
        setattr(torch.nn.Linear, "reset_parameters", reset_parameters)  # noqa: B010


@contextmanager
def rounded_in_place(in_float32: bool) -> Iterator[None]:
    """Keep peft from copying each new adapter to the 16 bits of its layer's weight and back: round its values in place.

    Args:
        in_float32: peft would copy them back.
    """
    moved = Linear._move_adapter_to_device_of_base_layer

    def move(layer: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        weight = getattr(layer.get_base_layer(), "weight", None)
        if type(weight) is not torch.nn.Parameter or weight.device.type != "cpu" or layer.lora_variant:
            moved(layer, adapter_name, *args, **kwargs)
        elif weight.dtype in (torch.float16, torch.bfloat16):
            for matrix in (layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight):
                matrix.data.copy_(matrix.data.to(weight.dtype))

    if in_float32:
        setattr(Linear, moved.__name__, move)
    try:
        yield
    finally:
        if in_float32:
            delattr(Linear, moved.__name__)


@contextmanager
def without_gptqmodel() -> Iterator[None]:
    """Keep peft from importing gptqmodel to compare its classes with each layer.

    No layer has them, and the import takes seconds, prints a banner, sets environment variables and patches libraries.
    """
    modules: list[Any] = [gptq, awq]
    originals = [module.is_gptqmodel_available for module in modules]
    for module in modules:
        module.is_gptqmodel_available = lambda: False
    try:
        yield
    finally:
        for module, function in zip(modules, originals, strict=True):
            module.is_gptqmodel_available = function


def _describe(error: Exception) -> str:
    """Return peft's message in one line; of several wrong shapes only the first."""
    shapes = re.search(r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)", str(error))
    if shapes is None:
        return one_line(error).rstrip(".")
    name, saved, expected = shapes.groups()
    return f"its {name.replace('.default', '')} has the shape ({saved}), the model needs ({expected})"


def _peft_config(options: Mapping[str, Any], folder: str, flag: str) -> LoraConfig:
    """Build peft's config of a saved adapter."""
    known = {item.name for item in fields(LoraConfig)}
    if unknown := [name for name, value in options.items() if value and name not in known]:
        what = f"{flag} {folder}: its option {unknown[0]} is unknown to the installed peft"
        raise ConfigError(what, "Install the peft version of constraints.txt")
    values = {name: options[name] for name in known & options.keys() - {"peft_type"} if options[name] is not None}
    if values.get("init_lora_weights") == "eva":  # the start of its training: here the values are read from the file
        values["init_lora_weights"] = True
    return LoraConfig(**values)


def _build_config(
    model: PreTrainedModel, checkpoint: Checkpoint, settings: LoraSettings, policy: EmbeddingsPolicy
) -> LoraConfig:
    architecture = architecture_of(checkpoint.model_type)
    targets = list(settings.target_modules or architecture.lora_targets)
    _check_targets(model, targets)
    tied = bool(model.config.tie_word_embeddings)
    embeddings: dict[str, Any] = {}
    if policy.mode == "full":
        # Only with ensure_weight_tying do tied embedding and head stay one tensor.
        embeddings = {"modules_to_save": list(architecture.embedding_modules), "ensure_weight_tying": tied}
    elif policy.mode == "chatml_tokens":
        ids = sorted(control_ids_of(checkpoint.tokenizer, checkpoint.family.control_tokens).values())
        names = architecture.embedding_modules[: 1 if tied else 2]
        embeddings = {"trainable_token_indices": {name: ids for name in names}}
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        bias=settings.bias,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        init_lora_weights=_PEFT_INITS.get(settings.init, True),
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        task_type="CAUSAL_LM",
        **embeddings,
    )


def _check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    layers = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    missing = [target for target in targets if target.rsplit(".", 1)[-1] not in layers]
    if missing:
        raise ConfigError(
            f"--lora_target_modules {' '.join(missing)}: the model has no such layers",
            f"It has {' '.join(sorted(layers))}",
        )
