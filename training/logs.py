"""Log lines of a run: on stderr, from the first process; and where TensorBoard's files go."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from processes import describe_process, is_first

if TYPE_CHECKING:
    from training.trainer import QwenTrainer

logger = logging.getLogger("finetune")

_KNOWN_WARNINGS = (
    "'pin_memory' argument is set as true but no accelerator is found",  # the Trainer's default, harmless on a CPU
    "`is_gradient_checkpointing` is deprecated",  # peft calls transformers by an old name
    r"`torch\.distributed\.\w+` is deprecated",  # DeepSpeed and FSDP call torch by old names, at every step
    "`gradient_checkpointing",  # peft and the Trainer read the old name of transformers' flag, which still works
)

_KNOWN_LINES = {
    "DeepSpeed": "Setting accelerator",
    "accelerate.accelerator": "Gradient accumulation steps mismatch",  # the Trainer accumulates by itself
}

# Of what they find on other machines, on import, once per layer.
_CHATTERERS = ("torchao", "torch.utils._pytree", "bitsandbytes")


class _Without(logging.Filter):
    """Lets all lines pass but those that hold a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in str(record.msg)


def quiet_libraries() -> None:
    """Keep what libraries say without a cause off the screen."""
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _CHATTERERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, message in _KNOWN_LINES.items():
        logging.getLogger(name).addFilter(_Without(message))


def _quiet_all_libraries() -> None:
    """Let the first process alone warn of what all of them find."""
    warnings.simplefilter("ignore")
    # Read when transformers is imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("DeepSpeed", "accelerate", "peft", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
        # DeepSpeed sets its own level when it is imported; a filter stays.
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)


def set_up_logging() -> None:
    """One format for all lines. Processes other than the first, as torchrun numbers them, only warn, by their rank."""
    quiet_libraries()
    # Read when torch is imported: a process that looks for one that is gone would print C++ frames, again and again.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    who = "" if is_first() else f"[{describe_process(with_host=False)}] "
    logging.basicConfig(
        stream=sys.stderr, format=f"%(asctime)s %(levelname)s {who}%(message)s", datefmt="%H:%M:%S", force=True
    )
    if who:
        _quiet_all_libraries()
    level = logging.WARNING if who else logging.INFO
    for name in ("finetune", "merge_lora", "training", "data_utils", "checkpoints", "export"):
        logging.getLogger(name).setLevel(level)


def set_tensorboard_folder(trainer: QwenTrainer, folder: str | None) -> None:
    """Have TensorBoard's files written where ``--logging_dir`` says; transformers would ask an environment variable."""
    from transformers.integrations.integration_utils import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = None if folder is None else os.path.expanduser(folder)
