# ruff: noqa: RUF009 - _flag returns a dataclass field
"""The arguments of a run as data: this project's flags, and those of transformers' TrainingArguments.

Creating and reading them touches no disk, no environment and no process, and imports neither torch nor transformers.
``training.config.parsing`` builds them from a command line.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from checkpoints.model_config import Quantization
from checkpoints.rope import MOST_FACTOR, MOST_POSITIONS, Yarn
from errors import ConfigError
from training.config.defaults import MODEL_MAX_LENGTH


def _flag(default: Any, help: str) -> Any:
    """Return a field with its default and its line of ``--help``."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelArguments:
    model_name_or_path: str = _flag("Qwen/Qwen-7B", "checkpoint folder, or model id on a hub")
    model_hub: Literal["hf", "modelscope"] = _flag("hf", "hub for model ids: Hugging Face or ModelScope")
    cache_dir: str | None = _flag(None, "cache folder for downloaded models")
    chat_template: str | None = _flag(
        None, "file with a Jinja chat template that replaces the checkpoint's; it is saved with the result"
    )
    attn_implementation: str | None = _flag(None, "eager, sdpa or flash_attention_2 (default: chosen by transformers)")
    loss: Literal["lean", "full_logits"] = _flag(
        "lean", "lean: computed in chunks, without storing all logits; full_logits: plain cross entropy, for comparison"
    )
    rope_scaling: Literal["yarn"] | None = _flag(
        None, "extend the model's positions for longer samples: yarn scales its rotary embeddings; needs --rope_factor"
    )
    rope_factor: float | None = _flag(None, "with --rope_scaling: positions afterwards, divided by those before")
    rope_original_length: int | None = _flag(
        None, "with --rope_scaling: positions before (default: max_position_embeddings of config.json)"
    )

    @property
    def yarn(self) -> Yarn | None:
        """The scaling of the rotary embeddings, if there is one; values out of range are reported later."""
        factor, original = self.rope_factor, self.rope_original_length
        if self.rope_scaling is None or factor is None or not 1 < factor <= MOST_FACTOR:
            return None
        return Yarn(factor, original if original is None or 1 <= original <= MOST_POSITIONS else None)


@dataclass(frozen=True)
class DataArguments:
    data_path: list[str] | None = _flag(
        None,
        "training conversations or texts: .json, .jsonl, .txt (also .gz) or .parquet files, or folders of them; FILE#N "
        "draws N records, FILE@xF uses each record F times",
    )
    eval_data_path: list[str] | None = _flag(None, "evaluation conversations, in the same forms")
    eval_split: float = _flag(0.0, "fraction of --data_path to hold out for evaluation, such as 0.05")
    data_format: Literal["auto", "conversations", "messages", "alpaca", "pairs", "text"] = _flag(
        "auto", "format of all data files; auto detects it for each file"
    )
    data_mixing: Literal["mixed", "sequential"] = _flag(
        "mixed", "mixed: shuffle all files together; sequential: in each epoch, train one file after the other"
    )
    fill: list[str] | None = _flag(None, "NAME=TEXT pairs; TEXT replaces {{NAME}} in all messages")
    allow_special_tokens: list[str] | None = _flag(
        None,
        "special tokens of the tokenizer, such as ones you added, that are trained as tokens where messages contain "
        "their text; never the control tokens of the chat format",
    )
    on_bad_record: Literal["error", "skip"] = _flag(
        "error", "error: refuse data with invalid records; skip: leave these records out"
    )
    lazy_preprocess: bool = _flag(False, "no effect; accepted for old command lines")
    system_message: str | None = _flag(
        None, "system message for conversations that have none (default: that of the model's chat format)"
    )
    label_mask: Literal["assistant", "qwen", "last", "all"] = _flag(
        "assistant",
        "tokens to train; assistant: every answer and its end token; last: only the last answer; qwen: as the "
        'original script, also the turn markers; all: every token; "train" and "weight" of a turn take precedence',
    )
    thinking: Literal["auto", "on", "off", "mixed"] = _flag(
        "auto",
        "prompts of models that can think; auto: an answer with thinking is trained behind the prompt that asks for "
        "it, one without behind the other; mixed: the same, without a warning; on: all behind the prompt that asks for "
        "it; off: all behind the other, without their thinking",
    )
    split_turns: Literal["auto", "always", "never"] = _flag(
        "auto",
        "always: a sample for each answer, with the prompt that leads to it; auto: only in conversations of which the "
        "chat format would train some answers not at all or without their thinking; never: whole conversations",
    )
    preserve_thinking: Literal["on", "off"] | None = _flag(
        None, "whether earlier thinking stays in prompts, where the chat template lets one choose (Qwen3.6, Qwen3.8)"
    )
    reasoning_effort: str | None = _flag(
        None, "how much the model is told to think, where the chat template has it (Qwen3.8: low, medium, xhigh)"
    )
    model_max_length: int = _flag(
        MODEL_MAX_LENGTH, "maximum tokens of a sample; the default is lowered to the model's limit"
    )
    padding_free: bool = _flag(
        True, "the samples of a batch form one row without padding; false: rows padded to the longest sample"
    )
    packing: bool | Literal["auto"] = _flag(
        "auto",
        "fill each row of a batch with whole samples, up to --model_max_length tokens: a batch of "
        "--per_device_train_batch_size N has N packs; auto: if the training data contains plain text",
    )
    truncation: Literal["turns", "turns_left", "cut", "drop", "error"] = _flag(
        "turns",
        "samples longer than --model_max_length; turns: drop the last turns; turns_left: drop the oldest turns; "
        "cut: cut off the rest, as the original script; drop: skip the sample; error: refuse the data",
    )
    data_cache_dir: str | None = _flag(
        None, "folder in which prepared data is kept for later runs (default: qwen-finetuning in your cache folder)"
    )
    no_data_cache: bool = _flag(False, "keep no prepared data, and use none")
    dataset_num_proc: int = _flag(1, "processes that check and tokenise the data side by side")

    @property
    def template_arguments(self) -> dict[str, Any]:
        """The arguments of the chat template that were given, beside the one that ``thinking`` decides."""
        given: dict[str, Any] = {}
        if self.preserve_thinking is not None:
            given["preserve_thinking"] = self.preserve_thinking == "on"
        if self.reasoning_effort is not None:
            given["reasoning_effort"] = self.reasoning_effort
        return given


@dataclass(frozen=True)
class LoraArguments:
    use_lora: bool = _flag(False, "train a LoRA adapter instead of all parameters")
    q_lora: bool = _flag(
        False, "train LoRA on quantised weights: the checkpoint's own (GPTQ, AWQ), else quantise while loading"
    )
    quant_type: Literal["nf4", "fp4"] | None = _flag(
        None, "with --q_lora: 4-bit data type for unquantised checkpoints (default: nf4)"
    )
    load_in_8bit: bool = _flag(False, "with --q_lora: quantise unquantised checkpoints to 8 bits instead of 4")
    lora_r: int = _flag(64, "rank of the adapter")
    lora_alpha: int = _flag(16, "scale of the adapter: its output is multiplied by alpha / rank")
    lora_dropout: float = _flag(0.05, "dropout on the adapter's input")
    lora_target_modules: list[str] | None = _flag(
        None, "names of the linear layers to adapt (default: all linear layers of the model's blocks)"
    )
    lora_rank_pattern: dict[str, int] | None = _flag(
        None, 'ranks of single layers, by the end of their names: {"mlp.c_proj": 16}'
    )
    lora_alpha_pattern: dict[str, float] | None = _flag(None, "alphas of single layers, in the same form")
    use_rslora: bool = _flag(False, "scale by alpha / sqrt(rank) instead: higher ranks learn as fast as low ones")
    use_dora: bool = _flag(False, "DoRA: also train the norm of each row of the merged weights; slower")
    init_lora_weights: str = _flag(
        "true",
        "first values of the adapter: true, gaussian, orthogonal (all without effect at first), or a part of the "
        "weights: pissa, pissa_niter_N (faster, N iterations), olora",
    )
    loraplus_lr_ratio: float = _flag(1.0, "LoRA+: learning rate of the adapter's B matrices / --learning_rate")
    lora_weight_path: str = _flag("", "adapter folder to continue training from")
    any_base: bool = _flag(
        False, "with --lora_weight_path: continue on other weights than those of its training, with a warning"
    )
    lora_bias: Literal["none", "all", "lora_only"] = _flag(
        "none", "biases to train: none, all, or those of the adapted layers"
    )
    trainable_embeddings: Literal["auto", "full", "chatml_tokens", "none"] = _flag(
        "auto",
        "with --use_lora: also train embedding and head (full), only their rows of <|im_start|> and <|im_end|> "
        "(chatml_tokens), or neither (none); auto: full for a Qwen v1 base model, else none",
    )

    @property
    def takes_weights(self) -> bool:
        """Whether the adapter begins as a part of the base's weights."""
        return self.init_lora_weights.lower().startswith(("pissa", "olora"))

    @property
    def method(self) -> str:
        """What makes the adapter another than a plain LoRA, for records; empty if nothing does."""
        words = [
            "rsLoRA" if self.use_rslora else "",
            "DoRA" if self.use_dora else "",
            f"begins as {self.init_lora_weights.lower()}" if self.init_lora_weights.lower() != "true" else "",
            "ranks by pattern" if self.lora_rank_pattern else "",
            "alphas by pattern" if self.lora_alpha_pattern else "",
            f"LoRA+ {self.loraplus_lr_ratio:g}" if self.loraplus_lr_ratio != 1 else "",
        ]
        return ", ".join(filter(None, words))

    @property
    def quantization(self) -> Quantization | None:
        """The type to which ``--q_lora`` quantises an unquantised checkpoint."""
        if not self.q_lora:
            return None
        return Quantization("int8", 8) if self.load_in_8bit else Quantization(self.quant_type or "nf4", 4)


@dataclass(frozen=True)
class TrainingOptions:
    """This project's additions to transformers' training flags."""

    join_micro_batches: bool = _flag(
        True,
        "join micro-batches of a step to rows of at most the tokens that the --per_device_train_batch_size longest "
        "samples have together: the same step, faster; not with padding, DeepSpeed or FSDP",
    )
    pure_bf16: bool = _flag(False, "keep trained parameters and optimizer in bfloat16 too, without float32 copies")
    logging_dir: str | None = _flag(None, "folder for TensorBoard files (default: runs/ in --output_dir)")
    early_stopping_patience: int | None = _flag(None, "stop after this many evaluations without an improvement")
    eval_generate: int | None = _flag(
        None,
        "at each evaluation, let the model answer this many questions of the evaluation data, and score the answers; "
        "as many from each source, drawn by --seed",
    )
    eval_max_new_tokens: int = _flag(256, "with --eval_generate: length limit of an answer")
    heartbeat_timeout: float = _flag(
        600.0, "seconds without progress after which a rank is reported and the run ends; 0 disables the check"
    )
    keep_samples: int = _flag(
        8, "conversations to keep in training_samples.json beside the result, which its merge is compared on; 0: none"
    )
    profile_steps: str | None = _flag(
        None, "optimizer steps to profile, FIRST:LAST; writes a trace and a table of the slowest operators"
    )


@dataclass(frozen=True)
class InvocationOptions:
    """Flags of one invocation, which the record of a run leaves at their defaults."""

    overwrite_output_dir: bool = _flag(
        False, "remove the files of an earlier run from --output_dir; other files are never removed"
    )
    allow_resume_changes: bool = _flag(
        False, "resume although data, seed, batch size or number of processes differ from the checkpoint's"
    )
    dry_run: bool = _flag(False, "show the data as it would be trained, and exit; writes nothing")
    plan: bool = _flag(False, "say what a step takes on this machine and whether it fits, and exit; writes nothing")


GROUPS: dict[str, Any] = {
    "model": ModelArguments,
    "data": DataArguments,
    "LoRA": LoraArguments,
    "run": TrainingOptions,
    "output": InvocationOptions,
}


@dataclass(frozen=True, kw_only=True)
class RunArguments(InvocationOptions):
    """All arguments of a run, by group.

    Attributes:
        trainer: the transformers flags that were given, by the names used here.
        trainer_defaults: the values of all transformers flags that were not given, by the names used here.
        debug: show the traceback of a failure.
    """

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    options: TrainingOptions
    trainer: dict[str, Any]
    trainer_defaults: dict[str, Any]
    debug: bool = False

    def trainer_value(self, name: str) -> Any:
        """Return the value of a transformers flag, for use before ``TrainingArguments`` exists."""
        return self.trainer.get(name, self.trainer_defaults[name])

    def trainer_values(self) -> SimpleNamespace:
        """Return all transformers flags as attributes, like ``TrainingArguments``, for use before it exists."""
        return SimpleNamespace(**{name: self.trainer_value(name) for name in self.trainer_defaults})

    @property
    def precision(self) -> str:
        """The precision of a step, by its flag; ``float32`` without one."""
        if self.options.pure_bf16:
            return "pure_bf16"
        return next((name for name in ("bf16", "fp16") if self.trainer_value(name)), "float32")

    @property
    def output_dir(self) -> Path:
        return Path(self.trainer_value("output_dir") or "trainer_output")

    @property
    def resume(self) -> str | None:
        """``--resume_from_checkpoint``: ``None``, ``auto``, ``True`` or a folder."""
        value = self.trainer_value("resume_from_checkpoint")
        if value is None or value.lower() == "false":
            return None
        return {"true": "True", "auto": "auto"}.get(value.lower(), str(value))

    @property
    def resumes_automatically(self) -> bool:
        """Return whether the run resumes if its output folder contains a checkpoint, and starts otherwise."""
        return self.resume == "auto"

    def to_dict(self) -> dict[str, Any]:
        """Return every flag with its value, in the form that ``--config`` reads to repeat the run from its start.

        Flags of one invocation keep their defaults: the checkpoint to resume, ``--overwrite_output_dir``,
        ``--allow_resume_changes``, ``--dry_run``, ``--plan``, and the hub's token.
        """
        values = {name: self.trainer_value(name) for name in self.trainer_defaults}
        for group in (self.model, self.data, self.lora, self.options):
            values |= asdict(group)
        values |= {item.name: item.default for item in fields(InvocationOptions)}
        values |= {"resume_from_checkpoint": None, "hub_token": None}
        return {**values, "output_dir": str(self.output_dir)}


def parse_profile_steps(value: str) -> tuple[int, int]:
    """Parse ``"5:8"``: the first and the last optimizer step to profile, both included, counted from 1.

    Raises:
        ConfigError: any other form.
    """
    match = re.fullmatch(r"([0-9]+):([0-9]+)", value)
    first, last = (int(number) for number in match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(
            f"--profile_steps {value} is not a range of optimizer steps",
            "Give FIRST:LAST, both included and counted from 1, such as 5:8",
        )
    return first, last
