"""Parsing command lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from console import python_command
from errors import ConfigError
from tests.models import TINY, copy_checkpoint
from training.config.parsing import parse_args
from training.training_arguments import build_training_arguments


def test_defaults_of_the_original_scripts_flags() -> None:
    args = parse_args([])
    assert args.model.model_name_or_path == "Qwen/Qwen-7B"
    assert (args.data.data_path, args.data.eval_data_path, args.data.lazy_preprocess) == (None, None, False)
    lora = args.lora
    assert (lora.use_lora, lora.q_lora, lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (False, False, 64, 16, 0.05)
    assert (lora.lora_target_modules, lora.lora_weight_path, lora.lora_bias) == (None, "", "none")
    assert (args.data.model_max_length, args.model.cache_dir) == (2048, None)
    assert build_training_arguments(args).optim == "adamw_torch_fused"


def test_defaults_of_own_flags() -> None:
    args = parse_args([])
    assert (args.lora.trainable_embeddings, args.data.label_mask, args.data.system_message) == (
        "auto",
        "assistant",
        None,
    )
    assert (args.options.pure_bf16, args.model.attn_implementation) == (False, None)


def test_given_values_are_parsed() -> None:
    flags = (
        "--model_name_or_path my/model --data_path train.json --eval_data_path eval.json --lazy_preprocess "
        "--use_lora --lora_r 8 --lora_alpha 32 --lora_dropout 0.1 --lora_target_modules c_attn w1 "
        "--lora_weight_path old --lora_bias lora_only --model_max_length 512 --cache_dir cache "
        "--trainable_embeddings chatml_tokens --label_mask qwen --attn_implementation eager "
        "--output_dir out --num_train_epochs 2.5 --per_device_train_batch_size 3 --gradient_accumulation_steps 4 "
        "--learning_rate 3e-4 --weight_decay 0.1 --adam_beta2 0.95 --warmup_steps 10 --lr_scheduler_type cosine "
        "--logging_steps 7 --save_strategy steps --save_steps 9 --save_total_limit 2 --gradient_checkpointing"
    )
    args = parse_args([*flags.split(), "--system_message", "Answer in one word."])
    assert args.model.model_name_or_path == "my/model"
    assert args.model.attn_implementation == "eager"
    data, lora, training = args.data, args.lora, build_training_arguments(args)
    assert (data.data_path, data.eval_data_path, data.lazy_preprocess) == (["train.json"], ["eval.json"], True)
    assert (data.label_mask, data.system_message) == ("qwen", "Answer in one word.")
    assert (lora.use_lora, lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (True, 8, 32, 0.1)
    assert lora.lora_target_modules == ["c_attn", "w1"]
    assert (lora.lora_weight_path, lora.lora_bias, lora.trainable_embeddings) == ("old", "lora_only", "chatml_tokens")
    assert (data.model_max_length, args.model.cache_dir, args.output_dir) == (512, "cache", Path("out"))
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (2.5, 3)
    assert (training.gradient_accumulation_steps, training.learning_rate, training.weight_decay) == (4, 3e-4, 0.1)
    assert (training.adam_beta2, training.warmup_steps, training.lr_scheduler_type) == (0.95, 10, "cosine")
    assert (training.logging_steps, training.save_strategy, training.save_steps) == (7, "steps", 9)
    assert (training.save_total_limit, training.gradient_checkpointing) == (2, True)


@pytest.mark.parametrize("form", ["--use_lora", "--use_lora True", "--use_lora true", "--use_lora=True"])
def test_forms_of_true(form: str) -> None:
    assert parse_args(form.split()).lora.use_lora is True


@pytest.mark.parametrize("form", ["--use_lora False", "--use_lora=false", ""])
def test_forms_of_false(form: str) -> None:
    assert parse_args(form.split()).lora.use_lora is False


def test_dashes_and_no_prefix_are_accepted() -> None:
    """As in transformers' own parser: dashes for underscores, and --no_ for flags that default to true."""
    words = ["--learning-rate=1e-4", "--no_average_tokens_across_devices", "--report-to", "none"]
    training = build_training_arguments(parse_args(words))
    assert (training.learning_rate, training.average_tokens_across_devices, training.report_to) == (1e-4, False, [])


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ("--use_lorra", "unknown flag --use_lorra (did you mean --use_lora?)."),
        ("--use_lor", "unknown flag --use_lor (did you mean --use_lora?)."),  # abbreviations are not expanded
        ("--bf 16", "unknown flag --bf (did you mean --bf16?)."),
        ("--evaluation_stratgy no", "unknown flag --evaluation_stratgy (did you mean --evaluation_strategy?)."),
        ("--xyzzy", "unknown flag --xyzzy."),
        ("stray", "unknown flag stray."),
        ("--lora_r many", "--lora_r many: expected a whole number."),
        ("--learning_rate fast", "--learning_rate fast: expected a number."),
        ("--lora_bias some", "--lora_bias some: expected one of none, all, lora_only."),
        ("--label_mask user", "--label_mask user: expected one of assistant, qwen, last, all."),
        ("--use_lora perhaps", "--use_lora perhaps: expected true or false."),
        ("--data_path", "argument --data_path: expected at least one argument."),
        ("--optim adamw_torhc", "--optim adamw_torhc: unknown value (did you mean adamw_torch?)."),
        ("--eval_strategy epcoh", "--eval_strategy epcoh: expected one of no, steps, epoch (did you mean epoch?)."),
        ("--log_level loud",
         "--log_level loud: expected one of debug, detail, info, warning, error, critical, passive."),
    ],
)  # fmt: skip
def test_refusal_is_one_line_with_flag_value_and_fix(command_line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(command_line.split())
    assert str(caught.value) == f"command line: {message} {python_command('finetune.py --help')} lists the flags"


def test_debug_is_a_switch_or_a_value_of_transformers() -> None:
    for words, debug, theirs in (
        ([], False, []), (["--debug"], True, []), (["--debug", "False"], False, []),
        (["--debug", "underflow_overflow"], False, ["underflow_overflow"]),
    ):  # fmt: skip
        args = parse_args(words)
        assert (args.debug, [option.value for option in build_training_arguments(args).debug]) == (debug, theirs)


def test_default_of_model_max_length_is_lowered_to_the_models_limit(tmp_path: Path) -> None:
    small = copy_checkpoint(tmp_path / "small", max_position_embeddings=64)
    assert parse_args(["--model_name_or_path", str(small)]).data.model_max_length == 64
    assert parse_args(["--model_name_or_path", str(TINY), "--model_max_length", "9"]).data.model_max_length == 9
    assert parse_args(["--model_name_or_path", str(tmp_path / "nowhere")]).data.model_max_length == 2048
