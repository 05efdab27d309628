"""Saving of a trained model: weights or adapter in the base's precision, with tokenizer and generation config.

Weights are read back after writing and compared with those in memory. A checkpoint's weights are restored from the same
tensors that were saved.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from chat.stops import stopping_generation_config
from checkpoints.base_files import CONFIG, GENERATION_CONFIG, Files, set_values, values_of, write_files
from checkpoints.companions import PROCESSOR_FILES
from checkpoints.files import save_json
from checkpoints.model_config import Rounding, dtype_name, result_config
from checkpoints.names import ADAPTER_SAFETENSORS, ADAPTER_WEIGHTS, BASE_QUANTIZATION, WEIGHTS
from checkpoints.other_parts import OtherParts
from checkpoints.rope import save_yarn
from checkpoints.rounding import round_rows
from checkpoints.shards import open_checkpoint, open_left_out
from checkpoints.source import TensorSource, is_finite
from checkpoints.whole import adapter_whole_name, has_other_parts, whole_options
from checkpoints.writing import save_checkpoint, save_tensors
from errors import ConfigError, RunError
from loading.chat_family import add_chat_template
from loading.checkpoint import Checkpoint
from loading.initial_values import is_plain, plain_config, plain_tensors
from qwen_model.architectures import architecture_of
from training.run_folder.failures import saving_errors
from training.run_folder.names import TRAINED_VALUES
from training.run_folder.staging import staged_files

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = 5 * 10**9
_FAULTY_DISK = "Nothing was saved: use another disk"


def save_model(
    model: PreTrainedModel | PeftModel,
    checkpoint: Checkpoint,
    folder: str | Path,
    state_dict: Mapping[str, Tensor] | None = None,
    show_progress: bool = True,
    exact: bool = False,
) -> None:
    """Save an adapter or all weights, with tokenizer and generation config, and verify them on disk.

    Args:
        model: the trained model, without a trainer's wrappers.
        checkpoint: the base model's; its precision is the one saved.
        folder: made if missing; a model's earlier files there are replaced when the new ones are complete.
        state_dict: the gathered weights, if the model itself is sharded.
        show_progress: draw progress bars on stderr.
        exact: save in the precision of memory instead, which a resumed run needs.

    Raises:
        RunError: the folder cannot be written, a tensor is not finite, or differs on disk from memory.
    """
    folder, dtype = Path(folder), None if exact else checkpoint.dtype
    with saving_errors(folder), staged_files(folder) as staging:
        files = companions(checkpoint)
        if isinstance(model, PeftModel):
            files = {name: content for name, content in files.items() if name not in PROCESSOR_FILES}
            others = checkpoint.other_parts
            save_adapter(model, dtype, staging, state_dict, on_whole=others is not None and others.is_whole)
            if checkpoint.yarn is not None:
                save_yarn(checkpoint.yarn, staging)
            if exact and not is_plain(model):
                tensors = {name: _to_disk(name, tensor, None) for name, tensor in trained_tensors(model).items()}
                save_tensors(tensors, staging / TRAINED_VALUES)
        else:
            save_full(model, checkpoint, dtype, staging, state_dict, show_progress)
            add_chat_template(files, checkpoint.model_type)
        write_files(files, staging)


def companions(checkpoint: Checkpoint) -> Files:
    """Return the base's tokenizer, as it is, and its generation settings, with the tokens that end an answer."""
    files = {name: content for name, content in checkpoint.files.items() if name != CONFIG}
    settings = values_of(files, GENERATION_CONFIG)
    set_values(
        files, GENERATION_CONFIG, stopping_generation_config(settings, checkpoint.end_ids, checkpoint.model_type)
    )
    return files


def trained_config(checkpoint: Checkpoint, dtype: torch.dtype) -> Files:
    """Return the base's config.json, but for what training changed."""
    files = {CONFIG: checkpoint.files[CONFIG]}
    config = result_config(values_of(files, CONFIG), dtype_name(dtype))
    if qwen_config := config.get("qwen_config"):  # Qwen v1 in Qwen2's layout: now a chat model
        config["qwen_config"] = {**qwen_config, "chat_format": "chatml"}
    # Other programs find their class by it.
    config["architectures"] = config.get("architectures") or [architecture_of(checkpoint.model_type).saved_class]
    set_values(files, CONFIG, config)
    return files


def trained_tensors(model: Any, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the tensors that are saved, by their names in the file: those of the adapter, or all of the model.

    Args:
        model: without a trainer's wrappers.
        state_dict: the gathered weights, if the model itself is sharded. Without it the tensors are views of the
            model's memory.
    """
    if isinstance(model, PeftModel):
        # By default peft looks the base up on the hub to decide whether embeddings were resized.
        return get_peft_model_state_dict(
            model, state_dict=None if state_dict is None else dict(state_dict), save_embedding_layers=False
        )
    tensors = dict(model.state_dict() if state_dict is None else state_dict)
    if model.config.tie_word_embeddings:
        for name in model.all_tied_weights_keys:
            tensors.pop(name, None)
    return tensors


@torch.no_grad()
def restore_tensors(model: Any, folder: Path) -> None:
    """Copy the weights or the adapter in a checkpoint to the model's memory, which keeps its precision.

    Raises:
        ConfigError: a file is damaged, or its tensors are not exactly those of the model; nothing is restored then.
    """
    files = ADAPTER_WEIGHTS if isinstance(model, PeftModel) else WEIGHTS
    # A run resumes from links to the weights alone, without config.json.
    has_others = has_other_parts({"model_type": model.config.model_type})
    saved = open_checkpoint(folder, files if is_plain(model) else (TRAINED_VALUES,), has_others)
    tensors, place = trained_tensors(model), saved.files[0] if len(saved.files) == 1 else folder
    fix = "Resume with the model and the adapter's settings that the checkpoint was trained with"
    for names, what in ((tensors.keys() - set(saved.names()), "lacks"), (set(saved.names()) - tensors.keys(), "has")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(f"{place} {what} {min(names)}{more}, unlike the model", fix)
    for name, tensor in tensors.items():
        if saved.shape(name) != tuple(tensor.shape):
            what = f"{place}: {name} has the shape {saved.shape(name)}, the model needs {tuple(tensor.shape)}"
            raise ConfigError(what, fix)
    for name, tensor in tensors.items():
        tensor.copy_(saved.read(name))


def save_adapter(
    model: PeftModel,
    dtype: torch.dtype | None,
    folder: Path,
    state_dict: Mapping[str, Tensor] | None = None,
    on_whole: bool = False,
) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` as peft reads them.

    Args:
        dtype: saved precision; ``None`` is that of memory.
        on_whole: other programs open the whole model of the base's folder, not its text model: by its config.json.
    """
    trained, config = trained_tensors(model, state_dict), copy.deepcopy(model.peft_config["default"])
    if not is_plain(model):
        trained, config = plain_tensors(trained), plain_config(config)  # of the rank and the base that others know
    # A tied embedding appears twice, and safetensors needs separate memory.
    tensors = {name: _to_disk(name, item, _saved_dtype(name, dtype)).clone() for name, item in trained.items()}
    stored = tensors
    if on_whole:
        stored = {adapter_whole_name(name): tensor for name, tensor in tensors.items()}
        for option, value in whole_options(vars(config)).items():
            setattr(config, option, value)
    save_tensors(stored, folder / ADAPTER_SAFETENSORS)
    config.inference_mode = True
    base = os.path.expanduser(config.base_model_name_or_path or "")
    if os.path.isdir(base):  # otherwise the name of a model on a hub
        config.base_model_name_or_path = os.path.abspath(base)  # the adapter is opened from other folders too
    config.save_pretrained(str(folder))
    if (quantization := getattr(model.config, "quantization_config", None)) is not None:
        # The adapter was trained beside weights that were rounded this way.
        save_json(quantization.to_dict(), folder / BASE_QUANTIZATION)
    _check_saved(tensors.items(), open_checkpoint(folder, (ADAPTER_SAFETENSORS,)))


def _saved_dtype(name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the precision of an adapter's tensor: norms of rows change by less than 16 bits can hold."""
    return None if name.endswith("lora_magnitude_vector") else dtype


def save_full(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    folder: Path,
    state_dict: Mapping[str, Tensor] | None = None,
    show_progress: bool = True,
) -> None:
    """Write all weights in safetensors shards, and a config with their precision.

    Args:
        dtype: see :func:`save_adapter`.
    """
    tensors = trained_tensors(model, state_dict)

    def as_saved(action: str) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tqdm(tensors.items(), action, unit=" tensors", disable=not show_progress):
            yield name, _to_disk(name, tensor, dtype)

    save_checkpoint(_with_other_parts(as_saved("Saving"), checkpoint.other_parts), folder, MAX_SHARD_SIZE)
    stored = dtype or next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    write_files(trained_config(checkpoint, stored), folder)
    _check_saved(as_saved("Checking"), open_checkpoint(folder))
    if checkpoint.other_parts is not None:
        _check_saved(_tensors_of(checkpoint.other_parts.tensors), open_left_out(folder))


def _with_other_parts(tensors: Iterable[tuple[str, Tensor]], others: OtherParts | None) -> Iterable[tuple[str, Tensor]]:
    """Yield the text model's tensors by the names that its folder gives them, then what the folder has beside them."""
    if others is None:
        return tensors
    return chain(((others.stored_name(name), tensor) for name, tensor in tensors), _tensors_of(others.tensors))


def _tensors_of(source: TensorSource) -> Iterator[tuple[str, Tensor]]:
    return ((name, source.read(name)) for name in source.names())


def _to_disk(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().to("cpu").contiguous()
    if tensor.is_floating_point():
        if dtype is not None and dtype != tensor.dtype:
            # Rounded to nearest, most of the base's weights would not have changed; LoRA's have no base.
            rounding: Rounding = "nearest" if ".lora_" in name else "dithered"
            rows = tensor.view(tensor.shape[0] if tensor.dim() else 1, -1)
            tensor = round_rows(rows.to(torch.float32), dtype, rounding, name, 0).view(tensor.shape)
        if not is_finite(tensor):
            raise RunError(
                f"{name} holds NaN or infinity: the run diverged, and nothing was saved", "Lower --learning_rate"
            )
    return tensor


def _check_saved(tensors: Iterable[tuple[str, Tensor]], reader: TensorSource) -> None:
    """Compare saved tensors with those in memory; warn about tensors that are all zero, as if nothing was gathered.

    Biases may be zeros, and so are all second matrices of an adapter that no step has changed yet.
    """
    all_zero, second_matrices = [], list[str]()
    for name, tensor in tensors:
        if name not in reader:
            raise RunError(f"{name} is missing from the saved file", _FAULTY_DISK)
        saved = reader.read(name)
        if saved.shape != tensor.shape or not torch.equal(saved, tensor):
            raise RunError(f"{name} differs on disk from memory", _FAULTY_DISK)
        second_matrices += [name] if ".lora_B." in name else []
        if tensor.dim() > 1 and not saved.any():
            all_zero.append(name)
    if all_zero and all_zero != second_matrices:
        logger.warning("%d saved tensors are all zero, among them %s", len(all_zero), all_zero[0])
