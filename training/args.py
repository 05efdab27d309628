"""The arguments of ``finetune.py``: the original script's, ours, and those of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from errors import CommandParser, ConfigError, one_line


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="Qwen/Qwen-7B", metadata={"help": "checkpoint folder, or a hub id"})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa or flash_attention_2; by default what transformers chooses"}
    )


@dataclass
class DataArguments:
    data_path: str | None = field(default=None, metadata={"help": "conversations to train on, .json or .jsonl"})
    eval_data_path: str | None = field(default=None, metadata={"help": "conversations to evaluate on"})
    lazy_preprocess: bool = field(
        default=False,
        metadata={"help": "accepted for old command lines; conversations are tokenised once, before the first step"},
    )
    system_message: str | None = field(
        default=None,
        metadata={"help": "system message of conversations without one; by default that of the model's family"},
    )
    label_mask: Literal["assistant", "qwen"] = field(
        default="assistant",
        metadata={"help": "assistant: train each answer and its end; qwen: also the turn marks, as the original did"},
    )


@dataclass
class LoraArguments:
    use_lora: bool = field(default=False, metadata={"help": "train a LoRA adapter instead of all parameters"})
    q_lora: bool = field(default=False, metadata={"help": "LoRA on quantised weights (not available yet)"})
    lora_r: int = field(default=64, metadata={"help": "rank"})
    lora_alpha: int = field(default=16, metadata={"help": "the adapter is scaled by alpha / rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout on the adapter's input"})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "names of linear layers; by default all those of the model's blocks"}
    )
    lora_weight_path: str = field(default="", metadata={"help": "continue this adapter"})
    lora_bias: Literal["none", "all", "lora_only"] = field(default="none", metadata={"help": "biases to train"})
    trainable_embeddings: Literal["auto", "full", "chatml_tokens", "none"] = field(
        default="auto",
        metadata={
            "help": "with LoRA: train embedding and head (full), their rows of <|im_start|> and <|im_end|> "
            "(chatml_tokens) or neither (none); auto: full for a Qwen v1 base model, else none"
        },
    )


@dataclass
class FinetuneArguments(TrainingArguments):
    """transformers' TrainingArguments with the original's additions."""

    cache_dir: str | None = field(default=None, metadata={"help": "folder of downloaded models"})
    model_max_length: int = field(default=8192, metadata={"help": "most tokens of a sample; longer ones lose turns"})
    pure_bf16: bool = field(
        default=False, metadata={"help": "hold also what is trained in bfloat16, without float32 copies"}
    )

    def __post_init__(self) -> None:
        # Without a GPU everything runs on the CPU anyway; transformers wants to be told before it allows bfloat16.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


@dataclass
class RunArguments:
    """All arguments of a run, by theme. Nothing changes them after parsing."""

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    training: FinetuneArguments

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return Path(str(self.training.output_dir))

    def resumed_checkpoint(self) -> str | None:
        """The checkpoint folder of ``--resume_from_checkpoint``; the value True means the newest in ``output_dir``.

        Raises:
            ConfigError: there is none.
        """
        value = self.training.resume_from_checkpoint
        if value is None or value.lower() == "false":
            return None
        folder = get_last_checkpoint(self.output_dir) if value.lower() == "true" and self.output_dir.is_dir() else value
        if folder is None or not (Path(folder) / "trainer_state.json").is_file():
            raise ConfigError(
                f"--resume_from_checkpoint {value}: there is no checkpoint", "Give a checkpoint-* folder of the run"
            )
        return folder

    def to_dict(self) -> dict[str, Any]:
        """Every flag with its value, as JSON can hold it."""
        return {
            **asdict(self.model),
            **asdict(self.data),
            **asdict(self.lora),
            **{name: value for name, value in self.training.to_dict().items() if not name.startswith("_")},
        }


class _Parser(CommandParser, HfArgumentParser):
    pass


def parse_args(argv: Sequence[str]) -> RunArguments:
    """Parse a command line.

    Raises:
        ConfigError: an unknown flag, a value that does not fit, or values that transformers refuses together.
    """
    sources: Any = (ModelArguments, DataArguments, LoraArguments, FinetuneArguments)
    parser = _Parser(sources, prog="python finetune.py", allow_abbrev=False, description="Fine-tune a Qwen model.")
    try:
        model, data, lora, training, unknown = parser.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
    except ConfigError:
        raise
    except (ValueError, ImportError) as error:
        # What TrainingArguments finds wrong, without its traceback.
        raise ConfigError(f"command line: {one_line(error)}") from error
    if unknown:
        parser.error(f"{unknown[0]} is no known flag")
    return RunArguments(model, data, lora, training)
