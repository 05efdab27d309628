"""Log lines of a run: on stderr, from the first process."""

from __future__ import annotations

import logging
import sys
import warnings

from training.args import RunArguments

logger = logging.getLogger("finetune")

_KNOWN_WARNINGS = (
    "'pin_memory' argument is set as true but no accelerator is found",  # the Trainer's default, harmless on a CPU
    "`is_gradient_checkpointing` is deprecated",  # peft calls transformers by an old name
)


def set_up_logging(args: RunArguments) -> None:
    """One format for all lines; processes other than the first only warn."""
    logging.basicConfig(
        stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    level = logging.INFO if args.training.process_index == 0 else logging.WARNING
    for name in ("finetune", "training", "data_utils", "checkpoints"):
        logging.getLogger(name).setLevel(level)
    if args.data.lazy_preprocess:
        logger.info("--lazy_preprocess: conversations are tokenised once, before the first step, so faults show early")
