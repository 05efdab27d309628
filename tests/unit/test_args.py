"""The command line of finetune.py: the original's flags, transformers' flags, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from errors import ConfigError
from tests.commands import finetune_here
from tests.models import TINY, write_conversations
from training.args import parse_args


def test_the_originals_flags_and_their_defaults() -> None:
    args = parse_args([])
    assert args.model.model_name_or_path == "Qwen/Qwen-7B"
    assert (args.data.data_path, args.data.eval_data_path, args.data.lazy_preprocess) == (None, None, False)
    lora = args.lora
    assert (lora.use_lora, lora.q_lora, lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (False, False, 64, 16, 0.05)
    assert (lora.lora_target_modules, lora.lora_weight_path, lora.lora_bias) == (None, "", "none")
    training = args.training
    assert (training.model_max_length, training.cache_dir, training.optim) == (8192, None, "adamw_torch_fused")


def test_our_flags_and_their_defaults() -> None:
    args = parse_args([])
    assert (args.lora.trainable_embeddings, args.data.label_mask, args.data.system_message) == (
        "auto",
        "assistant",
        None,
    )
    assert (args.training.pure_bf16, args.model.attn_implementation) == (False, None)


def test_every_flag_is_read() -> None:
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
    data, lora, training = args.data, args.lora, args.training
    assert (data.data_path, data.eval_data_path, data.lazy_preprocess) == ("train.json", "eval.json", True)
    assert (data.label_mask, data.system_message) == ("qwen", "Answer in one word.")
    assert (lora.use_lora, lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (True, 8, 32, 0.1)
    assert lora.lora_target_modules == ["c_attn", "w1"]
    assert (lora.lora_weight_path, lora.lora_bias, lora.trainable_embeddings) == ("old", "lora_only", "chatml_tokens")
    assert (training.model_max_length, training.cache_dir, args.output_dir) == (512, "cache", Path("out"))
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (2.5, 3)
    assert (training.gradient_accumulation_steps, training.learning_rate, training.weight_decay) == (4, 3e-4, 0.1)
    assert (training.adam_beta2, training.warmup_steps, training.lr_scheduler_type) == (0.95, 10, "cosine")
    assert (training.logging_steps, training.save_strategy, training.save_steps) == (7, "steps", 9)
    assert (training.save_total_limit, training.gradient_checkpointing) == (2, True)


@pytest.mark.parametrize("form", ["--use_lora", "--use_lora True", "--use_lora true", "--use_lora=True"])
def test_forms_of_a_switch_that_is_on(form: str) -> None:
    assert parse_args(form.split()).lora.use_lora is True


@pytest.mark.parametrize("form", ["--use_lora False", "--use_lora=false", ""])
def test_forms_of_a_switch_that_is_off(form: str) -> None:
    assert parse_args(form.split()).lora.use_lora is False


def test_bf16_works_without_a_gpu() -> None:
    for form in (["--bf16"], ["--bf16", "True"]):
        training = parse_args(form).training
        assert training.bf16 is True
        assert training.use_cpu is not torch.cuda.is_available()


@pytest.mark.parametrize(
    ("command_line", "flag", "reason"),
    [
        ("--use_lorra", "--use_lorra", "is no known flag. python finetune.py --help lists the flags"),
        ("--use_lor", "--use_lor", "is no known flag"),  # a flag is not guessed from its start
        ("--bf 16", "--bf", "is no known flag"),
        ("stray", "stray", "is no known flag"),
        ("--lora_r many", "--lora_r", "invalid int value: 'many'"),
        ("--learning_rate fast", "--learning_rate", "invalid float value: 'fast'"),
        ("--lora_bias some", "--lora_bias", "invalid choice: 'some'"),
        ("--trainable_embeddings half", "--trainable_embeddings", "invalid choice: 'half'"),
        ("--label_mask user", "--label_mask", "invalid choice: 'user'"),
        ("--use_lora perhaps", "--use_lora", "perhaps"),
        ("--data_path", "--data_path", "expected one argument"),
        ("--bf16 --fp16", "bf16", "fp16"),
        ("--lr_scheduler_type wavy", "--lr_scheduler_type", "wavy"),
        ("--optim magic", "--optim", "magic"),
        ("--save_strategy sometimes", "--save_strategy", "sometimes"),
        # Flags that transformers 5 dropped and that still stand in people's scripts.
        ("--evaluation_strategy steps", "--evaluation_strategy", "is no known flag"),
        ("--overwrite_output_dir", "--overwrite_output_dir", "is no known flag"),
    ],
)
def test_what_is_refused_is_named_in_one_line(command_line: str, flag: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=r"^command line: ") as caught:
        parse_args(command_line.split())
    message = str(caught.value)
    assert flag in message and reason in message and "\n" not in message


def test_a_config_file_is_not_taken_for_the_command_line(tmp_path: Path) -> None:
    """transformers' parser would read flags from NAME.args beside the script, or from a single argument NAME.json."""
    file = tmp_path / "flags.json"
    file.write_text('{"use_lora": true}')
    with pytest.raises(ConfigError, match="is no known flag"):
        parse_args([str(file)])


def test_nothing_changes_the_arguments_after_parsing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def keep(argv: list[str]) -> object:
        seen.append(parse_args(argv))
        seen.append(copy.deepcopy(seen[0].to_dict()))
        return seen[0]

    monkeypatch.setattr("training.args.parse_args", keep)
    data = write_conversations(tmp_path / "train.json")
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--eval_data_path", data, "--output_dir", tmp_path / "out",
        "--use_lora", "--max_steps", 2, "--eval_strategy", "steps", "--eval_steps", 1, "--gradient_checkpointing",
        "--save_strategy", "no",
    )  # fmt: skip
    args, before = seen
    assert args.to_dict() == before
    assert args.lora.lora_target_modules is None
    assert json.loads((tmp_path / "out" / "run_args.json").read_text()) == json.loads(json.dumps(before, default=str))


def test_all_flags_are_in_the_record() -> None:
    recorded = parse_args(["--use_lora", "--learning_rate", "1e-3"]).to_dict()
    expected = {
        "model_name_or_path": "Qwen/Qwen-7B", "attn_implementation": None, "data_path": None, "eval_data_path": None,
        "lazy_preprocess": False, "system_message": None, "label_mask": "assistant", "use_lora": True, "q_lora": False,
        "lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_modules": None, "lora_weight_path": "",
        "lora_bias": "none", "trainable_embeddings": "auto", "cache_dir": None, "model_max_length": 8192,
        "pure_bf16": False, "learning_rate": 1e-3, "seed": 42, "num_train_epochs": 3.0,
    }  # fmt: skip
    assert recorded | expected == recorded
    assert json.loads(json.dumps(recorded, default=str)) is not None
