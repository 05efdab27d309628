"""The arguments of ``finetune.py``: the original script's, ours, and those of transformers' Trainer.

Nothing here imports torch or transformers, so that a wrong flag is refused at once. ``RunArguments.training`` does,
when it is first used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from checkpoints.model_config import Quantization
from errors import ConfigError
from loading.config_files import find_local_folder, load_model_config, most_positions
from processes import is_restart
from training.config.command_line import parse_command_line
from training.config.config_file import SUFFIXES, Setting, load_config_file
from training.config.flags import Flag, flags_of, nearest, transformers_flags
from training.config.old_flags import old_flags, translate_old_flags
from training.run_folder.output import newest_checkpoint

if TYPE_CHECKING:
    from training.training_arguments import FinetuneArguments
import re


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="Qwen/Qwen-7B", metadata={"help": "checkpoint folder, or a hub id"})
    model_hub: Literal["hf", "modelscope"] = field(
        default="hf", metadata={"help": "where a hub id is looked up: Hugging Face's hub or ModelScope"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa or flash_attention_2; by default what transformers chooses"}
    )
    loss: Literal["lean", "full_logits"] = field(
        default="lean",
        metadata={"help": "lean: from hidden states, in chunks; full_logits: the plain one, for comparison"},
    )


@dataclass
class DataArguments:
    data_path: list[str] | None = field(
        default=None,
        metadata={
            "help": "conversations to train on: .json, .jsonl (also .gz), .parquet, or folders of them; "
            "FILE#N draws N records, FILE@xF takes each F times"
        },
    )
    eval_data_path: list[str] | None = field(default=None, metadata={"help": "conversations to evaluate on"})
    eval_split: float = field(
        default=0.0, metadata={"help": "share of --data_path that is held out to evaluate on, 0.05 for a twentieth"}
    )
    data_format: Literal["auto", "conversations", "messages", "alpaca", "pairs"] = field(
        default="auto", metadata={"help": "format of all files; auto recognises it, file by file"}
    )
    data_mixing: Literal["mixed", "sequential"] = field(
        default="mixed",
        metadata={"help": "several files are shuffled together, or trained one after the other in each epoch"},
    )
    fill: list[str] | None = field(
        default=None, metadata={"help": "name=text pairs; text replaces {{name}} in all messages"}
    )
    on_bad_record: Literal["error", "skip"] = field(
        default="error", metadata={"help": "refuse data with records that cannot be used, or leave these out"}
    )
    lazy_preprocess: bool = field(
        default=False,
        metadata={"help": "accepted for old command lines; conversations are tokenised once, before the first step"},
    )
    system_message: str | None = field(
        default=None,
        metadata={"help": "system message of conversations without one; by default that of the model's family"},
    )
    label_mask: Literal["assistant", "qwen", "last", "all"] = field(
        default="assistant",
        metadata={
            "help": "assistant: train each answer and its end; last: only the last one; qwen: also the turn marks, as "
            'the original did; all: everything; "train" and "weight" of a turn go before'
        },
    )
    truncation: Literal["turns", "turns_left", "cut", "drop", "error"] = field(
        default="turns",
        metadata={
            "help": "what is longer than --model_max_length loses whole turns from its end, or its oldest ones, is cut "
            "as in the original, left out, or refused"
        },
    )


@dataclass
class LoraArguments:
    use_lora: bool = field(default=False, metadata={"help": "train a LoRA adapter instead of all parameters"})
    q_lora: bool = field(
        default=False,
        metadata={"help": "LoRA on quantised weights: the checkpoint's own (GPTQ, AWQ), else quantised while loading"},
    )
    quant_type: Literal["nf4", "fp4"] | None = field(
        default=None,
        metadata={"help": "with --q_lora: the 4-bit type of weights that are not quantised yet; by default nf4"},
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "with --q_lora: quantise to 8 bits instead of 4 what is not quantised yet"}
    )
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

    @property
    def quantization(self) -> Quantization | None:
        """How ``--q_lora`` quantises a checkpoint that is not quantised yet."""
        if not self.q_lora:
            return None
        return Quantization("int8", 8) if self.load_in_8bit else Quantization(self.quant_type or "nf4", 4)


@dataclass
class TrainingOptions:
    """What stands beside transformers' flags in ``RunArguments.training``."""

    cache_dir: str | None = field(default=None, metadata={"help": "folder of downloaded models"})
    model_max_length: int = field(
        default=8192,
        metadata={"help": "most tokens of a sample; by default not more than the model can"},
    )
    pure_bf16: bool = field(
        default=False, metadata={"help": "hold also what is trained in bfloat16, without float32 copies"}
    )
    logging_dir: str | None = field(
        default=None, metadata={"help": "where TensorBoard's files go; by default runs/ in --output_dir"}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after this many evaluations without a better one"}
    )
    heartbeat_timeout: float = field(
        default=600.0,
        metadata={
            "help": "of several processes one that is silent, or behind the others and does not move, for so many "
            "seconds is named, and the run ends; 0: never"
        },
    )
    profile_steps: str | None = field(
        default=None, metadata={"help": "FIRST:LAST steps to profile: a trace and a table of the dearest operators"}
    )


@dataclass
class RunOptions:
    """What is done before a run and is no part of it."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove what an earlier run left in --output_dir; only files a run writes"}
    )
    allow_resume_changes: bool = field(
        default=False,
        metadata={"help": "go on from a checkpoint of other data, seed, batch or number of processes"},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "read and show the data as it would be trained, and end; writes nothing"}
    )


GROUPS: dict[str, Any] = {
    "model": ModelArguments,
    "data": DataArguments,
    "LoRA": LoraArguments,
    "run": TrainingOptions,
    "output": RunOptions,
}


@dataclass(kw_only=True)
class RunArguments(RunOptions):
    """All arguments of a run, by theme. Nothing changes them after parsing.

    Attributes:
        trainer: transformers' flags that were given, with today's names.
        debug: whether a failure shows its traceback.
    """

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    options: TrainingOptions
    trainer: dict[str, Any]
    debug: bool = False

    @cached_property
    def training(self) -> FinetuneArguments:
        """transformers' TrainingArguments with ours beside them. Imports torch and transformers.

        Raises:
            ConfigError: values that transformers refuses.
        """
        from training.training_arguments import build_training_arguments

        return build_training_arguments(self.trainer, self.options)

    def trainer_value(self, name: str) -> Any:
        """The value of one of transformers' flags, without importing transformers."""
        return self.trainer.get(name, _trainer_flags()[name].default)

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.trainer_value("output_dir") or "trainer_output").expanduser()

    @property
    def resume(self) -> str | None:
        """``--resume_from_checkpoint``: nothing, ``auto``, ``True``, or a folder."""
        value = self.trainer_value("resume_from_checkpoint")
        if value is None or value.lower() == "false":
            return None
        return {"true": "True", "auto": "auto"}.get(value.lower(), str(value))

    @property
    def resumes_itself(self) -> bool:
        """Whether the output folder decides if the run goes on or starts."""
        return self.resume == "auto"

    @property
    def starts_anew(self) -> bool:
        """Whether what an earlier run left is given up.

        With ``auto`` only once: processes that a launcher starts again after a failure go on with what they saved.
        """
        return self.overwrite_output_dir and not (self.resumes_itself and is_restart())

    def resumed_checkpoint(self) -> str | None:
        """The folder of ``--resume_from_checkpoint`` as far as names tell; which one is whole is found out later.

        Raises:
            ConfigError: there is none, and ``auto`` was not given.
        """
        value = self.resume
        if value is None or (self.resumes_itself and self.starts_anew):
            return None
        folder = newest_checkpoint(self.output_dir) if value in ("True", "auto") else Path(value).expanduser()
        if folder is not None and (folder / "trainer_state.json").is_file():
            return str(folder)
        if self.resumes_itself:
            return None
        raise ConfigError(
            f"--resume_from_checkpoint {self.trainer_value('resume_from_checkpoint')}: there is no checkpoint",
            "Give a checkpoint-* folder of the run",
        )

    def to_dict(self) -> dict[str, Any]:
        """Every flag with its value, as ``--config`` reads it: the same run again, from its start.

        What is said only once is left at its default: the checkpoint to resume, leave to overwrite, a dry run, the
        hub's token.
        """
        values = {name: self.trainer_value(name) for name in _trainer_flags()}
        for part in (self.model, self.data, self.lora, self.options):
            values |= asdict(part)
        values |= {item.name: item.default for item in fields(RunOptions)}
        values |= {"resume_from_checkpoint": None, "hub_token": None}
        return {**values, "output_dir": str(self.output_dir)}


def parse_args(argv: Sequence[str]) -> RunArguments:
    """Parse a command line, and the file of ``--config`` (or the only argument) behind it.

    Raises:
        ConfigError: an unknown flag, or a value that does not fit; the flag and, in a file, the line are named.
    """
    ours = {title: flags_of(declaration) for title, declaration in GROUPS.items()}
    known = {name: flag for flags in ours.values() for name, flag in flags.items()}
    trainer = {name: flag for name, flag in _trainer_flags().items() if name not in known}
    known |= trainer
    old = old_flags(known)
    if len(argv) == 1 and argv[0].endswith(SUFFIXES) and not argv[0].startswith("-"):
        argv = ["--config", argv[0]]
    given = parse_command_line(argv, ours, trainer, old)
    layers = [{name: Setting(value) for name, value in given.items() if name != "config"}]
    if given.get("config") is not None:
        layers.insert(0, load_config_file(given["config"]))
    values: dict[str, Any] = {}
    for layer in layers:
        converted = {name: _convert(name, setting, known | old) for name, setting in layer.items()}
        debug = converted.get("debug", Setting(False))
        if debug.where and debug.value is True:
            raise ConfigError(f"{debug.where}: debug cannot stand in a file", "Give --debug")
        values |= {name: setting.value for name, setting in translate_old_flags(converted, old).items()}
    return _build(values)


def _convert(name: str, setting: Setting, flags: dict[str, Flag]) -> Setting:
    flag, where = flags.get(name), setting.where
    if flag is None:
        near = nearest(name, flags)
        fix = f"Did you mean {near}?" if near else "python finetune.py --help_all lists the flags"
        raise ConfigError(f"{where}: {name} is no known flag", fix)
    try:
        return Setting(flag.convert(setting.value), where)
    except ValueError as error:
        shown = setting.value if isinstance(setting.value, str) else json.dumps(setting.value, default=str)
        place = f"{where}: {name}: {shown}" if where else f"command line: --{name} {shown}"
        raise ConfigError(f"{place}: {error}", "" if where else "python finetune.py --help lists the flags") from error


def _trainer_flags() -> dict[str, Flag]:
    """transformers' flags by the names used here, which are the same for all its versions."""
    flags = dict(transformers_flags())
    # Newer names of what stands below, and another way to save on SIGTERM, which is always done here.
    for name in ("activation_checkpointing", "activation_checkpointing_kwargs", "enable_jit_checkpoint"):
        flags.pop(name, None)
    replaced = {
        "gradient_checkpointing": Flag(
            "gradient_checkpointing", frozenset({"bool"}), False, bare=True,
            help="compute activations again in the backward pass: less memory, slower steps",
        ),
        "gradient_checkpointing_kwargs": Flag(
            "gradient_checkpointing_kwargs", frozenset({"dict"}), None, optional=True,
            help="options of torch.utils.checkpoint",
        ),
        "resume_from_checkpoint": Flag(
            "resume_from_checkpoint", frozenset({"str"}), None, optional=True, bare="True",
            help="continue from a checkpoint-* folder; True: from the newest whole one in --output_dir; auto: from "
            "that, or start where there is none",
        ),
        "debug": Flag(
            "debug", frozenset({"bool", "str"}), False, bare=True, choices=("underflow_overflow", "tpu_metrics_debug"),
            help="show the traceback of a failure; transformers' underflow_overflow can be given too",
        ),
        "fsdp": Flag(
            "fsdp", frozenset({"bool"}), False, bare=True, help="shard the model over all processes with FSDP2"
        ),
        "output_dir": Flag("output_dir", frozenset({"str"}), "trainer_output", help="folder for the result"),
    }  # fmt: skip
    return flags | replaced


def _build(values: dict[str, Any]) -> RunArguments:
    parts = {}
    for declaration in GROUPS.values():
        names = [item.name for item in fields(declaration)]
        parts[declaration] = {name: values.pop(name) for name in names if name in values}
    model = ModelArguments(**parts[ModelArguments])
    options = TrainingOptions(**parts[TrainingOptions])
    if "model_max_length" not in parts[TrainingOptions]:
        config = load_model_config(find_local_folder(model.model_name_or_path, options.cache_dir, model.model_hub))
        options.model_max_length = min(options.model_max_length, most_positions(config) or options.model_max_length)
    debug = values.get("debug")
    if isinstance(debug, bool):
        del values["debug"]
    return RunArguments(
        model=model,
        data=DataArguments(**parts[DataArguments]),
        lora=LoraArguments(**parts[LoraArguments]),
        options=options,
        trainer=values,
        debug=debug is True,
        **parts[RunOptions],
    )


def parse_profile_steps(value: str) -> tuple[int, int]:
    """``"5:8"`` to the first and the last optimizer step that are profiled, both included, counted from 1.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"([0-9]+):([0-9]+)", value)
    first, last = (int(number) for number in match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(
            f"--profile_steps {value} is no range of optimizer steps",
            "Give FIRST:LAST, both included and counted from 1, such as 5:8",
        )
    return first, last
