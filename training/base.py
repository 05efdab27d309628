"""The checkpoint that a run trains."""

from __future__ import annotations

from loading.checkpoint import Checkpoint, load_checkpoint
from training.config.args import RunArguments


def load_base(args: RunArguments, *, reads_weights: bool = True) -> Checkpoint:
    """Read the checkpoint of a run, without its weights; see ``load_checkpoint``."""
    model, adapter = args.model, args.lora.lora_weight_path
    return load_checkpoint(
        model.model_name_or_path,
        model.cache_dir,
        model.model_hub,
        reads_weights=reads_weights,
        yarn=model.yarn,
        chat_template=model.chat_template,
        adapters=[adapter] if adapter else [],
    )
