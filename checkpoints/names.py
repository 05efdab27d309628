"""Names of files in the folder of a checkpoint or an adapter, and of the records that a run leaves beside them.

``config.json`` and ``generation_config.json`` are written as literals, as in other libraries. The files that a run uses
itself (checkpoints, manifest, trainer state) are in ``training/run_folder/names.py``. Needs no torch.
"""

from __future__ import annotations

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Weights of a model in order of preference; sharded ones have an index, ``NAME.index.json``."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_SAFETENSORS = "adapter_model.safetensors"
ADAPTER_WEIGHTS = (ADAPTER_SAFETENSORS, "adapter_model.bin")
"""Weights of an adapter in order of preference."""

TEMPLATES_FOLDER = "additional_chat_templates"
"""A folder with the named chat templates of a tokenizer, ``NAME.jinja``, beside its default one."""

BASE_QUANTIZATION = "base_quantization.json"
"""The quantization_config of a model that was quantised while it was loaded, beside its adapter."""

BASE_ROPE = "base_rope.json"
"""How the rotary embeddings of a model were scaled while it was loaded, beside its adapter."""

QUANTIZATION_REPORT = "quantization_report.json"
"""What quantising a model cost, beside its weights."""

MERGE_REPORT = "merge_report.json"
"""What was merged into a folder's weights, and how much of the change they hold."""

RUN_ARGUMENTS = "run_args.json"
RUN_ARGUMENTS_YAML = "run_args.yaml"  # of earlier versions
RUN_SUMMARY = "run_summary.json"
TRAINING_LOG = "training_log.jsonl"
LOSS_CURVE = "training_loss.png"
DATA_REPORT = "data_receipt.json"
DATA_REPORT_PAGE = "data_receipt.html"
TRAINING_SAMPLES = "training_samples.json"
EVAL_SAMPLES = "eval_samples.jsonl"

RUN_RECORDS = (
    RUN_ARGUMENTS, RUN_ARGUMENTS_YAML, RUN_SUMMARY, TRAINING_LOG, LOSS_CURVE, DATA_REPORT, DATA_REPORT_PAGE,
    TRAINING_SAMPLES, EVAL_SAMPLES,
)  # fmt: skip
"""All records that a run writes beside its model or adapter and tokenizer."""
