"""Conflicts between arguments, checkpoint and disk: refused before anything is loaded, with the fix."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path

import pytest
import torch

from console import pip_command
from errors import ConfigError
from tests.golden import SMALL
from tests.models import TINY, change_json, write_later_checkpoint
from training.checks import REPORTERS, check_args
from training.config.parsing import parse_args
from training.run_folder.start import resumed_checkpoint

DATA = SMALL / "train.json"
NAME_DATA = "Give a file of conversations or a folder of them; #N draws N records, @xF takes each F times"
EVALUATES = ("--eval_data_path", DATA, "--eval_strategy", "steps")


def check(tmp_path: Path, *flags: object, output: Path | None = None) -> None:
    """Check a valid command line with ``flags`` added."""
    valid = ["--model_name_or_path", TINY, "--data_path", DATA, "--output_dir", output or tmp_path / "new"]
    check_args(parse_args([str(flag) for flag in (*valid, *flags)]))


def refuses(message: str, tmp_path: Path, *flags: object, output: Path | None = None) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check(tmp_path, *flags, output=output)


def test_valid_command_line_passes_and_nothing_is_written(tmp_path: Path) -> None:
    check(tmp_path)
    check(tmp_path, "--use_lora", "--bf16", "--trainable_embeddings", "chatml_tokens")
    check(tmp_path, "--trainable_embeddings", "full")
    check(tmp_path, "--eval_strategy", "steps", "--eval_data_path", DATA)
    check(
        tmp_path, *EVALUATES, "--load_best_model_at_end", "--early_stopping_patience", 2, "--save_steps", 0.2,
        "--eval_steps", 0.1, "--metric_for_best_model", "eval_loss", "--profile_steps", "2:3", "--report_to", "none",
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_missing_data_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^--data_path is missing\. Give a file of conversations, or a folder of such files$"
    ):
        check_args(parse_args(["--model_name_or_path", str(TINY), "--output_dir", str(tmp_path / "new")]))


def test_missing_data_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.json"
    for flag in ("--data_path", "--eval_data_path"):
        refuses(f"{flag} {path}: there is no such file. {NAME_DATA}", tmp_path, flag, path)
        what = f"{flag} {path}#5@x2: there is no such file as {path}"
        refuses(f"{what}. {NAME_DATA}", tmp_path, flag, f"{path}#5@x2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_split", 1], "--eval_split 1 is out of range. Give a fraction from 0 to below 1"),
        (["--eval_split", 0.1, "--eval_data_path", DATA],
         "--eval_split 0.1 and --eval_data_path both select evaluation data. Give one of them"),
        (["--fill", "name"], '--fill name is not name=text. Write --fill name="the text"'),
        (["--fill", "a=1", "a=2"], "--fill gives a twice. Give each name once"),
        (["--data_path", f"{DATA}#0"], f"--data_path {DATA}#0 takes nothing. Leave it out, or give more than 0"),
        (["--data_mixing", "sequential", "--train_sampling_strategy", "group_by_length"],
         "--data_mixing sequential and --train_sampling_strategy group_by_length are different orders. "
         "Give one of them"),
        (["--packing", "--train_sampling_strategy", "group_by_length"],
         "--packing True and --train_sampling_strategy group_by_length are two ways to form batches. Give one of them: "
         "packs are all of about the same length"),
        (["--packing", "--padding_free", "false"],
         "--packing True needs rows without padding: --padding_free False. Remove one of them"),
    ],
)  # fmt: skip
def test_invalid_data_flags_are_refused(flags: list[object], message: str, tmp_path: Path) -> None:
    refuses(message, tmp_path, *flags)


def test_more_data_processes_than_could_help_are_refused(tmp_path: Path) -> None:
    check(tmp_path, "--dataset_num_proc", 16)
    most = max(16, 4 * (os.cpu_count() or 1))
    fix = f"Give 1 to {most}: only as many as there are CPU cores work at the same time"
    refuses(f"--dataset_num_proc 100000 is out of range. {fix}", tmp_path, "--dataset_num_proc", 100_000)


def test_eval_split_provides_evaluation_data(tmp_path: Path) -> None:
    check(tmp_path, "--eval_split", 0.1, "--eval_strategy", "epoch", "--load_best_model_at_end", "--save_strategy",
          "epoch")  # fmt: skip


def test_label_smoothing_needs_the_lean_loss(tmp_path: Path) -> None:
    smoothing = ["--label_smoothing_factor", "0.1"]
    refuses(
        "--label_smoothing_factor 0.1 needs --loss lean. Remove --label_smoothing_factor or --loss",
        tmp_path,
        *smoothing,
        "--loss",
        "full_logits",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    for flags in ([], ["--use_lora"], ["--use_cpu"]):
        refuses("--fp16 needs a GPU, and none is available. Remove it, or use --bf16", tmp_path, "--fp16", *flags)


@pytest.mark.parametrize("value", [0, -5])
@pytest.mark.parametrize(
    "flag",
    [
        "--model_max_length", "--per_device_train_batch_size", "--per_device_eval_batch_size",
        "--gradient_accumulation_steps", "--lora_r", "--lora_alpha", "--save_total_limit",
    ],
)  # fmt: skip
def test_counts_below_1_are_refused(tmp_path: Path, flag: str, value: int) -> None:
    least = 2 if flag == "--model_max_length" else 1
    refuses(f"{flag} {value} is out of range. Give {least} or more", tmp_path, "--use_lora", flag, value)


def test_what_trains_nothing_is_refused(tmp_path: Path) -> None:
    refuses("--max_steps 0 trains nothing. Give 1 or more, or leave it out", tmp_path, "--max_steps", 0)
    check(tmp_path, "--max_steps", -1)
    refuses("--model_max_length 1 is out of range. Give 2 or more", tmp_path, "--model_max_length", 1)


def test_unknown_flash_attention_is_refused(tmp_path: Path) -> None:
    what = "--attn_implementation flash_attention_9 is unknown. Give one of sdpa, eager, flash_attention_2, "
    refuses(f"{what}flash_attention_3, flash_attention_4", tmp_path, "--attn_implementation", "flash_attention_9")


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    message = "--lora_dropout 1.5 is out of range. Give 0 or more and less than 1"
    refuses(message, tmp_path, "--use_lora", "--lora_dropout", 1.5)
    refuses("--adam_beta2 1.0 is out of range. Give 0 or more and less than 1", tmp_path, "--adam_beta2", 1)
    refuses("--learning_rate -1.0 is out of range. Give 0 or more", tmp_path, "--learning_rate", -1)
    message = "--logging_steps 0 is out of range. Give a number of steps, or a fraction of all steps"
    refuses(message, tmp_path, "--logging_steps", 0)
    refuses("--save_steps 1.5 is not a whole number of steps. Give a whole number", tmp_path, "--save_steps", 1.5)
    message = "--dataloader_prefetch_factor needs --dataloader_num_workers. Give 1 or more workers"
    refuses(message, tmp_path, "--dataloader_prefetch_factor", 2)
    message = (
        "--profile_steps 8:5 is not a range of optimizer steps. "
        "Give FIRST:LAST, both included and counted from 1, such as 5:8"
    )
    refuses(message, tmp_path, "--profile_steps", "8:5")
    refuses("--num_train_epochs 0.0 trains nothing. Give more than 0", tmp_path, "--num_train_epochs", 0)
    check(tmp_path, "--num_train_epochs", 0, "--max_steps", 1)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluation_needs_data(tmp_path: Path, strategy: str) -> None:
    message = f"--eval_strategy {strategy} has no data to evaluate on. Give --eval_data_path or --eval_split too"
    refuses(message, tmp_path, "--eval_strategy", strategy)


def test_lora_flags_need_use_lora(tmp_path: Path) -> None:
    for flags in (
        "--lora_weight_path old", "--lora_r 8", "--lora_alpha 8", "--lora_dropout 0.5", "--lora_bias all",
        "--lora_target_modules c_attn w1", "--trainable_embeddings none", "--trainable_embeddings chatml_tokens",
    ):  # fmt: skip
        message = (
            f"{flags} needs --use_lora: without it all parameters are trained. "
            f"Add --use_lora, or remove {flags.split()[0]}"
        )
        refuses(message, tmp_path, *flags.split())


def test_flags_must_not_contradict_a_continued_adapter(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    message = f"--lora_weight_path {adapter} holds no adapter_config.json. Give the folder of a saved adapter"
    refuses(message, tmp_path, "--use_lora", "--lora_weight_path", adapter)
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["w1", "c_attn"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    flags = ("--use_lora", "--lora_weight_path", adapter)
    check(tmp_path, *flags, "--lora_r", 8, "--lora_target_modules", "c_attn", "w1")
    message = "--lora_r 4: the adapter of --lora_weight_path has 8. Remove --lora_r, or train a new adapter"
    refuses(message, tmp_path, *flags, "--lora_r", 4)


def test_precisions_exclude_each_other(tmp_path: Path) -> None:
    refuses("--fp16 and --bf16 are two precisions. Give one of them", tmp_path, "--fp16", "--bf16")
    refuses("--fp16 and --pure_bf16 are two precisions. Give one of them", tmp_path, "--fp16", "--pure_bf16")


def test_unknown_target_modules_are_refused(tmp_path: Path) -> None:
    """The known ones are read from the header of the weights, or from the index of several files."""
    message = (
        "--lora_target_modules q_proj: the model has no such layers. Choose from c_attn, c_proj, lm_head, w1, w2, wte"
    )
    flags = ("--use_lora", "--lora_target_modules", "c_attn", "mlp.c_proj", "q_proj")
    refuses(message, tmp_path, *flags)
    check(tmp_path, *flags[:-1])
    later = write_later_checkpoint(tmp_path / "later", "qwen2")
    names = {f"model.layers.0.mlp.{name}.weight": "a" for name in ("up_proj", "down_proj")}
    (later / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    message = "--lora_target_modules c_attn mlp.c_proj: the model has no such layers. Choose from down_proj, up_proj"
    refuses(message, tmp_path, "--model_name_or_path", later, *flags[:-1])


def test_model_max_length_beyond_the_positions_is_refused(tmp_path: Path) -> None:
    message = f"--model_max_length 2049 exceeds the 2048 positions of {TINY}. Give 2048 or less"
    refuses(message, tmp_path, "--model_max_length", 2049)
    check(tmp_path, "--model_max_length", 2048)  # beyond seq_length, 64: dynamic NTK
    later = write_later_checkpoint(tmp_path / "later", "qwen3")
    message = (
        f"--model_max_length 513 exceeds the 512 positions of {later}. Give 512 or less, or extend them with "
        "--rope_scaling yarn --rope_factor 2"
    )
    refuses(message, tmp_path, "--model_name_or_path", later, "--model_max_length", 513)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    change_json(later / "config.json", rope_scaling=yarn)
    check(tmp_path, "--model_name_or_path", later, "--model_max_length", 1024)
    message = f"--model_max_length 1025 exceeds the 1024 positions of {later}. Give 1024 or less"
    refuses(message, tmp_path, "--model_name_or_path", later, "--model_max_length", 1025)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--load_best_model_at_end", "--load_best_model_at_end needs evaluations. "
         "Give --eval_strategy, and --eval_data_path or --eval_split"),
        ("{evaluates} --load_best_model_at_end --save_strategy epoch", "--load_best_model_at_end: --save_strategy "
         "epoch and --eval_strategy steps differ. Give the same strategy to both"),
        ("{evaluates} --load_best_model_at_end --save_steps 5 --eval_steps 2", "--load_best_model_at_end: "
         "--save_steps 5 is not a multiple of --eval_steps 2. Save after every evaluation, or after every second, "
         "third..."),
        ("{evaluates} --load_best_model_at_end --save_steps 5 --eval_steps 0.1", "--load_best_model_at_end: "
         "--save_steps 5 is not a multiple of --eval_steps 0.1. Save after every evaluation, or after every second, "
         "third..."),
        ("{evaluates} --load_best_model_at_end --save_steps 5 --logging_steps 2", "--load_best_model_at_end: "
         "--save_steps 5 is not a multiple of --eval_steps 2. Save after every evaluation, or after every second, "
         "third..."),
        ("{evaluates} --early_stopping_patience 2", "--early_stopping_patience 2 needs --load_best_model_at_end. "
         "Add it. Give --eval_strategy, and --eval_data_path or --eval_split"),
        ("--save_strategy best",
         "--save_strategy best needs evaluations. Give --eval_strategy, and --eval_data_path or --eval_split"),
        ("--lr_scheduler_type reduce_lr_on_plateau", "--lr_scheduler_type reduce_lr_on_plateau needs evaluations. "
         "Give --eval_strategy, and --eval_data_path or --eval_split"),
        ("{evaluates} --metric_for_best_model bleu", "--metric_for_best_model bleu is unknown. "
         "Give loss or token_accuracy; with --eval_generate also exact_match, contains, rouge_l, chrf, valid_json, "
         "call_name, call_arguments, stopped"),
        ("{evaluates} --metric_for_best_model eval_chrf",
         "--metric_for_best_model eval_chrf needs answers. Add --eval_generate 50"),
        ("--eval_generate 5",
         "--eval_generate 5 needs evaluations. Give --eval_strategy, and --eval_data_path or --eval_split"),
        ("{evaluates} --eval_generate 0", "--eval_generate 0 is out of range. Give 1 or more, or leave it out"),
        ("{evaluates} --eval_max_new_tokens 9", "--eval_max_new_tokens 9 needs --eval_generate. Add it"),
        ("{evaluates} --eval_generate 5 --eval_max_new_tokens 0",
         "--eval_max_new_tokens 0 is out of range. Give 1 or more"),
        ("{evaluates} --eval_generate 5 --eval_max_new_tokens 2048", "--eval_max_new_tokens 2048 leaves no room for a "
         "question in the 2048 positions of the model. Give less than 2048"),
        ("--eval_on_start", "--eval_on_start has no data to evaluate on. Give --eval_data_path or --eval_split too"),
    ],
)  # fmt: skip
def test_flags_that_depend_on_evaluations(tmp_path: Path, flags: str, message: str) -> None:
    words = flags.replace("{evaluates}", " ".join(map(str, EVALUATES))).split()
    refuses(message, tmp_path, *words)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    flags = ("--data_path", "none.json", "--bf16", "--fp16", "--lora_r", 8, "--load_best_model_at_end")
    (tmp_path / "out").write_text("")
    refuses(
        "6 faults in the arguments:\n"
        f"  1. --data_path none.json: there is no such file. {NAME_DATA}\n"
        "  2. --fp16 and --bf16 are two precisions. Give one of them\n"
        "  3. --lora_r 8 needs --use_lora: without it all parameters are trained. Add --use_lora, or remove --lora_r\n"
        "  4. --load_best_model_at_end needs evaluations. Give --eval_strategy, and --eval_data_path or --eval_split\n"
        "  5. --report_to wandbb: unknown service (did you mean wandb?). Known are " + ", ".join(REPORTERS) + "\n"
        f"  6. --output_dir {tmp_path / 'out'} is a file. Give a folder",
        tmp_path, *flags, "--report_to", "wandbb", output=tmp_path / "out",
    )  # fmt: skip


def test_checks_do_not_change_the_arguments(tmp_path: Path) -> None:
    args = parse_args(
        ["--model_name_or_path", str(TINY), "--data_path", str(DATA), "--output_dir", str(tmp_path / "x")]
    )
    before = copy.deepcopy(args.to_dict())
    check_args(args)
    assert args.to_dict() == before


def test_resumed_checkpoint_is_the_named_or_the_newest(tmp_path: Path) -> None:
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    for value, folder in ((tmp_path / "checkpoint-2", "checkpoint-2"), ("True", "checkpoint-10")):
        flags = ["--resume_from_checkpoint", str(value)]
        check(tmp_path, *flags, output=tmp_path)
        assert resumed_checkpoint(parse_args(["--output_dir", str(tmp_path), *flags])) == str(tmp_path / folder)
    assert resumed_checkpoint(parse_args(["--output_dir", str(tmp_path)])) is None


@pytest.mark.parametrize("value", ["/nowhere", "True", "true"])
def test_missing_checkpoint_is_refused(tmp_path: Path, value: str) -> None:
    message = f"--resume_from_checkpoint {value}: there is no checkpoint. Give a checkpoint-* folder of the run"
    for output in (tmp_path / "new", tmp_path):
        refuses(message, tmp_path, "--resume_from_checkpoint", value, output=output)


def test_reporter_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    message = f"--report_to wandb: not installed. {pip_command('wandb')}, or remove the flag"
    refuses(message, tmp_path, "--report_to", "wandb")
    check(tmp_path, "--report_to", "none")
