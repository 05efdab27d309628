"""Names of files and folders in a run folder; those of models, adapters and records are in ``checkpoints.names``."""

from __future__ import annotations

import re

from checkpoints.names import (
    ADAPTER_CONFIG,
    ADAPTER_SAFETENSORS,
    BASE_QUANTIZATION,
    BASE_ROPE,
    RUN_ARGUMENTS,
    RUN_RECORDS,
    RUN_SUMMARY,
    TEMPLATES_FOLDER,
    TRAINING_LOG,
)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # a folder, by its optimizer step
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
TRAINED_VALUES = "trained_values.safetensors"  # of an adapter that is saved in another form than it is trained in
STAGING = ".saving"  # a folder: what is being written is here until it is complete
TEMPORARY = re.compile(r"\..*\.partial(-\d)?")  # a folder: a file is here until it is complete

PROFILE = "profile"  # a folder
PROFILE_TRACE, PROFILE_OPERATORS = "trace.json", "operators.txt"
TENSORBOARD = "runs"  # a folder

OWNERSHIP_RECORDS = (TRAINING_LOG, RUN_SUMMARY, RUN_ARGUMENTS)
"""A folder with one of these files is a run's."""

RUN_WEIGHTS = re.compile(
    re.escape(ADAPTER_SAFETENSORS) + r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
"""Weights that a run writes."""

RUN_FILE = re.compile(
    "|".join(map(re.escape, (*RUN_RECORDS, ADAPTER_CONFIG, BASE_QUANTIZATION, BASE_ROPE)))
    + rf"|{RUN_WEIGHTS.pattern}|config\.json|generation_config\.json"
    r"|[^/]+\.tiktoken|tokenizer(_config)?\.json|vocab\.json|merges\.txt|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.(jinja|json)"
)
"""Files that a run writes into its folder."""

RUN_SUBFOLDERS = {
    TENSORBOARD: re.compile(r"events\.out\.tfevents"),
    TEMPLATES_FOLDER: re.compile(r".+\.jinja$"),
    PROFILE: re.compile(rf"({re.escape(PROFILE_TRACE)}(\.gz)?|{re.escape(PROFILE_OPERATORS)})$"),
}
"""Folders that a run writes beside its checkpoints; the beginning of every file's name in them must match."""
