"""Log lines of a run: on stderr, from the first process."""

from __future__ import annotations

import logging
import os
import sys
import warnings

logger = logging.getLogger("finetune")

_KNOWN_WARNINGS = (
    "'pin_memory' argument is set as true but no accelerator is found",  # the Trainer's default, harmless on a CPU
    "`is_gradient_checkpointing` is deprecated",  # peft calls transformers by an old name
    "`gradient_checkpointing",  # the flag that everybody knows, renamed in transformers 5.2x and still working
)


def set_up_logging() -> None:
    """One format for all lines; processes other than the first, as torchrun numbers them, only warn."""
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.basicConfig(
        stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    for name in ("finetune", "training", "data_utils", "checkpoints"):
        logging.getLogger(name).setLevel(level)
