"""Old names of flags."""

from __future__ import annotations

import pytest

from errors import ConfigError
from training.config.parsing import parse_args
from training.training_arguments import build_training_arguments


@pytest.mark.parametrize(
    ("old", "flag", "value"),
    [
        ("--evaluation_strategy steps", "eval_strategy", "steps"),
        ("--warmup_ratio 0.01", "warmup_steps", 0.01),
        ("--warmup_ratio 0", "warmup_steps", 0.0),
        ("--group_by_length", "train_sampling_strategy", "group_by_length"),
        ("--group_by_length False", "train_sampling_strategy", "random"),
        ("--no_cuda", "use_cpu", True),
        ("--per_gpu_train_batch_size 3", "per_device_train_batch_size", 3),
        ("--per_gpu_eval_batch_size 3", "per_device_eval_batch_size", 3),
        ("--adafactor", "optim", "adafactor"),
        ("--gradient_checkpointing", "gradient_checkpointing", True),
        ("--activation_checkpointing", "gradient_checkpointing", True),
        ('--gradient_checkpointing_kwargs {"use_reentrant":false}', "gradient_checkpointing_kwargs",
         {"use_reentrant": False}),
    ],
)  # fmt: skip
def test_old_name_sets_the_current_flag(old: str, flag: str, value: object) -> None:
    args = parse_args(old.split())
    assert args.trainer_value(flag) == value
    assert getattr(build_training_arguments(args), flag) == value
    assert args.to_dict()[flag] == value


@pytest.mark.parametrize(("ratio", "steps"), [("0", 0), ("0.01", 2), ("0.5", 76), ("1", 151), ("1.0", 151)])
def test_warmup_ratio_is_a_fraction_of_all_steps(ratio: str, steps: int) -> None:
    assert build_training_arguments(parse_args(["--warmup_ratio", ratio])).get_warmup_steps(151) == steps


@pytest.mark.parametrize("ratio", ["1.5", "-0.1"])
def test_warmup_ratio_outside_0_to_1_is_refused(ratio: str) -> None:
    with pytest.raises(ConfigError, match=f"^--warmup_ratio {ratio}: expected a number from 0 to 1$"):
        parse_args(["--warmup_ratio", ratio])


@pytest.mark.parametrize(
    "words",
    [
        "--save_safetensors", "--save_safetensors True", "--fp16_backend auto", "--half_precision_backend cuda_amp",
        "--fp16_opt_level O2", "--tpu_num_cores 8", "--use_mps_device", "--past_index -1", "--use_ipex False",
        "--include_tokens_per_second", "--ray_scope last",
    ],
)  # fmt: skip
def test_old_flag_without_effect_is_ignored_and_logged(words: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="training"):
        assert parse_args(words.split()).to_dict() == parse_args([]).to_dict()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"{words.split()[0]} has no effect"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--save_safetensors False", "--save_safetensors False is not supported: weights are saved as safetensors "
         "only, because reading a pickle can run code. Remove --save_safetensors"),
        ("--half_precision_backend apex", "--half_precision_backend apex is not supported: mixed precision always "
         "uses torch's autocast. Remove --half_precision_backend"),
        ("--sharded_ddp simple", "--sharded_ddp simple is not supported: transformers no longer supports fairscale. "
         "Remove --sharded_ddp"),
        ("--fsdp_min_num_params 1000", "--fsdp_min_num_params 1000 is not supported: FSDP2 (--fsdp) shards each block "
         "of the model by itself. Remove --fsdp_min_num_params"),
        ("--evaluation_strategy no --eval_strategy no", "--evaluation_strategy and --eval_strategy are the same flag. "
         "Give one of them"),
        ("--warmup_steps 10 --warmup_ratio 0.1", "--warmup_ratio and --warmup_steps are the same flag. "
         "Give one of them"),
        ("--activation_checkpointing --gradient_checkpointing", "--activation_checkpointing and "
         "--gradient_checkpointing are the same flag. Give one of them"),
    ],
)  # fmt: skip
def test_old_flag_that_asks_for_a_removed_feature_is_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(words.split())
    assert str(caught.value) == message
