"""Log lines of a run: on stderr, from the first process; and where TensorBoard's files go."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.trainer import QwenTrainer

logger = logging.getLogger("finetune")

_KNOWN_WARNINGS = (
    "'pin_memory' argument is set as true but no accelerator is found",  # the Trainer's default, harmless on a CPU
    "`is_gradient_checkpointing` is deprecated",  # peft calls transformers by an old name
    "`gradient_checkpointing",  # peft and the Trainer read the old name of transformers' flag, which still works
)

# Of what they find on other machines, on import, once per layer.
_CHATTERERS = ("torchao", "torch.utils._pytree", "bitsandbytes")


def quiet_libraries() -> None:
    """Keep what libraries say without a cause off the screen."""
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _CHATTERERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def set_up_logging() -> None:
    """One format for all lines; processes other than the first, as torchrun numbers them, only warn."""
    quiet_libraries()
    logging.basicConfig(
        stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    for name in ("finetune", "merge_lora", "training", "data_utils", "checkpoints", "export"):
        logging.getLogger(name).setLevel(level)


def set_tensorboard_folder(trainer: QwenTrainer, folder: str | None) -> None:
    """Have TensorBoard's files written where ``--logging_dir`` says; transformers would ask an environment variable."""
    from transformers.integrations.integration_utils import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = None if folder is None else os.path.expanduser(folder)
