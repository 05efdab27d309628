"""Write a checkpoint as one GGUF file, which llama.cpp and what is built on it read."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chat.families import Family
from chat.stops import end_ids_of
from checkpoints.dequantized_reader import open_dequantized
from checkpoints.folders import check_space
from checkpoints.input_folders import check_model_files
from checkpoints.model_config import dtype_name
from checkpoints.source import TensorSource, main_dtype
from console import ROOT, show
from errors import ConfigError, RunError
from export.conversion import Conversion, convert_checkpoint
from export.gguf_driver import Q4_K_M, Job
from export.gguf_models import load_model_type
from loading.chat_family import chat_family
from loading.checkpoint import load_generation_config
from loading.tensor_check import check_tensors
from loading.tokenizer import load_tokenizer
from outputs import staged_file

# Bytes per weight. Q4_K_M has 0.6 if its blocks of 256 divide the rows, and stores others in more bits.
_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, Q4_K_M: 0.85}
_FULL_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_OTHER_BYTES = 32_000_000  # vocabulary and metadata


@dataclass(frozen=True)
class Exported:
    """An opened checkpoint.

    Attributes:
        end_ids: ids that end an answer; see :func:`chat.stops.end_ids_of`.
    """

    folder: Path
    model_type: str
    source: TensorSource
    tokenizer: Any
    family: Family
    end_ids: list[int]
    generation_config: Any


def open_model(folder: Path) -> Exported:
    """Open a checkpoint to export; of its weights only the headers are read.

    Raises:
        ConfigError: it is quantised, of an unknown architecture, damaged, or has no ChatML.
    """
    check_model_files(folder)
    model_type = load_model_type(folder)
    source = open_dequantized(folder, torch.float16)
    check_tensors(folder, source)
    tokenizer = load_tokenizer(folder, f"{folder}: its tokenizer cannot be read")
    if not (end_ids := end_ids_of(tokenizer)):
        raise ConfigError(f"{folder}: the tokenizer has no ChatML tokens", "Use the checkpoint's own tokenizer")
    family = chat_family(model_type, tokenizer)
    if family.stops:  # the first one becomes the file's end of an answer
        end_ids = [*dict.fromkeys([*map(tokenizer.convert_tokens_to_ids, family.stops), *end_ids])]
    return Exported(folder, model_type, source, tokenizer, family, end_ids, load_generation_config(folder))


def export_model(model: Exported, outfile: Path, quantize: str, tools: Path) -> dict[str, Any]:
    """Write ``outfile``, which must not exist, and check it; return what was checked, see :mod:`export.gguf_check`.

    Args:
        quantize: type of the weights, a key of ``_BYTES``.
        tools: folder of the converter, and of llama-cpp-python for what llama.cpp quantises.

    Raises:
        ConfigError: the file exists, or the disk is too small.
        RunError: the conversion failed, or the file is not the checkpoint's.
    """
    full_type = _FULL_TYPES.get(main_dtype(model.source), "f32")
    is_v1 = model.model_type == "qwen"
    with staged_file(outfile, replaces=False) as staging:
        weights = sum(math.prod(model.source.shape(name)) for name in model.source.names())
        parts = [_BYTES[quantize], *([_BYTES[full_type]] if quantize == Q4_K_M else [])]
        needed = int(weights * sum(parts)) + _OTHER_BYTES + (model.source.total_nbytes() if is_v1 else 0)
        check_space(needed, outfile, "--outfile")
        folder = model.folder
        if is_v1:
            folder = staging.with_name("qwen2")
            convert_checkpoint(Conversion(model.folder, folder, "qwen2", None, None, False, 2 * 10**9))
        name = model.folder.resolve().name
        job = Job(str(folder.resolve()), str(staging.resolve()), quantize, full_type, name, model.end_ids[0])
        show(f"converting: {model.folder} ({dtype_name(main_dtype(model.source))}) to {quantize}")
        return run_driver(job, tools)


def run_driver(job: Job, tools: Path) -> dict[str, Any]:
    """Run :mod:`export.gguf_driver` with the packages in ``tools`` before those of this environment.

    Raises:
        RunError: it failed; with the last line that it printed.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tools.resolve())]),
        **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
    }
    alive, held = os.pipe()
    try:
        command = [sys.executable, "-m", "export.gguf_driver", json.dumps(vars(job))]
        result = subprocess.run(command, cwd=ROOT, env=environment, stdin=alive, capture_output=True, text=True)
    finally:
        os.close(alive)
        os.close(held)
    if result.returncode == 0:
        answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        if "error" in answer:
            raise RunError(answer["error"])
        return answer
    if os.strerror(errno.ENOSPC) in result.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), job.outfile)
    lines = [line for line in result.stderr.splitlines() if line.strip()] or [f"exit code {result.returncode}"]
    raise RunError(f"the conversion for llama.cpp failed: {lines[-1][:500]}")
