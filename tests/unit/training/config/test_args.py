"""Parsing the command line and config files of finetune.py."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from errors import ConfigError
from tests.commands import finetune_here
from tests.models import TINY, write_conversations
from training.config.parsing import parse_args
from training.run_folder.start import resumed_checkpoint
from training.training_arguments import build_training_arguments, remove_accelerate_variables


def test_defaults_of_the_original_scripts_flags() -> None:
    args = parse_args([])
    assert args.model.model_name_or_path == "Qwen/Qwen-7B"
    assert (args.data.data_path, args.data.eval_data_path, args.data.lazy_preprocess) == (None, None, False)
    lora = args.lora
    assert (lora.use_lora, lora.q_lora, lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (False, False, 64, 16, 0.05)
    assert (lora.lora_target_modules, lora.lora_weight_path, lora.lora_bias) == (None, "", "none")
    assert (args.data.model_max_length, args.model.cache_dir) == (8192, None)
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


def test_bf16_works_without_a_gpu() -> None:
    for form in (["--bf16"], ["--bf16", "True"]):
        training = build_training_arguments(parse_args(form))
        assert training.bf16 is True
        assert training.use_cpu is not torch.cuda.is_available()


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
    assert str(caught.value) == f"command line: {message} python finetune.py --help lists the flags"


def test_dashes_and_no_prefix_are_accepted() -> None:
    """As in transformers' own parser: dashes for underscores, and --no_ for flags that default to true."""
    words = ["--learning-rate=1e-4", "--no_remove_unused_columns", "--report-to", "none"]
    training = build_training_arguments(parse_args(words))
    assert (training.learning_rate, training.remove_unused_columns, training.report_to) == (1e-4, False, [])


def test_refusal_by_transformers_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^command line: .*torch_empty_cache_steps"):
        build_training_arguments(parse_args(["--torch_empty_cache_steps", "0"]))


def test_debug_is_a_switch_or_a_value_of_transformers() -> None:
    for words, debug, theirs in (
        ([], False, []), (["--debug"], True, []), (["--debug", "False"], False, []),
        (["--debug", "underflow_overflow"], False, ["underflow_overflow"]),
    ):  # fmt: skip
        args = parse_args(words)
        assert (args.debug, [option.value for option in build_training_arguments(args).debug]) == (debug, theirs)


def test_default_of_model_max_length_is_lowered_to_the_models_limit(tmp_path: Path) -> None:
    assert parse_args(["--model_name_or_path", str(TINY)]).data.model_max_length == 2048
    assert parse_args(["--model_name_or_path", str(TINY), "--model_max_length", "9"]).data.model_max_length == 9
    assert parse_args(["--model_name_or_path", str(tmp_path / "nowhere")]).data.model_max_length == 8192


def test_accelerate_variables_have_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_USE_CPU", "true")):
        monkeypatch.setenv(name, value)
    remove_accelerate_variables()
    training = build_training_arguments(parse_args([]))
    assert (training.bf16, training.mixed_precision) == (False, "no")
    assert Accelerator(mixed_precision=None, cpu=True).mixed_precision == "no"


# ------------------------------------------------------------------------------------------------------------ old names


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


# --------------------------------------------------------------------------------------------------------- config files


YAML = """\
# a comment
use_lora: true
eval_strategy: no      # a string, not false
learning_rate: 3e-4
lora_target_modules: [c_attn, w1]
lr_scheduler_kwargs:
  num_cycles: 0.5
system_message: "Be \\U0001F600 brief."
warmup_ratio: 0.1
report_to: none
save-steps: 7
"""
JSON = """{
\t"use_lora": true, "eval_strategy": "no",
\t"learning_rate": 3e-4, "lora_target_modules": ["c_attn", "w1"], "lr_scheduler_kwargs": {"num_cycles": 0.5},
\t"system_message": "Be \\ud83d\\ude00 brief.", "warmup_ratio": 0.1, "report_to": "none", "save-steps": 7
}
"""


@pytest.mark.parametrize(("name", "text"), [("run.yaml", YAML), ("run.yml", YAML), ("run.json", JSON)])
def test_file_equals_the_same_command_line(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    flags = [
        "--use_lora", "--eval_strategy", "no", "--learning_rate", "3e-4", "--lora_target_modules", "c_attn", "w1",
        "--lr_scheduler_kwargs", '{"num_cycles": 0.5}', "--system_message", "Be 😀 brief.", "--warmup_steps", "0.1",
        "--report_to", "none", "--save_steps", "7",
    ]  # fmt: skip
    expected = parse_args(flags).to_dict()
    assert parse_args([str(file)]).to_dict() == expected
    assert parse_args(["--config", str(file)]).to_dict() == expected
    # The command line overrides the file, also by another name of the flag.
    changed = parse_args(
        ["--learning_rate", "1e-3", "--config", str(file), "--warmup_steps", "3", "--use_lora", "False"]
    )
    assert changed.to_dict() == expected | {"learning_rate": 1e-3, "warmup_steps": 3.0, "use_lora": False}


UNKNOWN = "{file}:2: unknown flag use_lorra (did you mean use_lora?). python finetune.py --help_all lists the flags"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "seed: 1\nuse_lorra: true\n", UNKNOWN),
        ("a.json", '{"seed": 1,\n "use_lorra": true}', UNKNOWN),
        ("a.yaml", "seed: 1\n\nlora_r: many\n", "{file}:3: lora_r: many: expected a whole number"),
        ("a.json", '{"seed": 1,\n\n"lora_r": 8.5}', "{file}:3: lora_r: 8.5: expected a whole number"),
        ("a.json", '{"bf16": 1}', "{file}:1: bf16: 1: expected true or false"),
        ("a.yaml", "lora_r:\n", "{file}:1: lora_r: null: expected a whole number"),
        ("a.yaml", "run_name: 2024\n", "{file}:1: run_name: 2024: expected a string"),
        ("a.yaml", "lora_target_modules: [1, 2]\n",
         "{file}:1: lora_target_modules: [1, 2]: expected a list of strings"),
        ("a.yaml", "seed: 1\nseed: 2\n", "{file}:2: seed is given twice. Remove one of them"),
        ("a.json", '{"seed": 1,\n"seed": 2}', "{file}:2: seed is given twice. Remove one of them"),
        ("a.yaml", "evaluation_strategy: 'no'\neval_strategy: 'no'\n",
         "{file}:1: --evaluation_strategy and --eval_strategy are the same flag. Give one of them"),
        ("a.yaml", "seed: 1\nsave_safetensors: false\n", "{file}:2: --save_safetensors False is not supported: "
         "weights are saved as safetensors only, because reading a pickle can run code. Remove --save_safetensors"),
        ("a.yaml", "- seed\n", "{file}:1: not a mapping. Write flag: value, one per line"),
        ("a.json", "[1]", '{file}:1: not an object. Write {"flag": value, ...}'),
        ("a.yaml", "seed: [1\nx: 2\n", "{file}:2: not YAML (expected ',' or ']', but got ':')"),
        ("a.yaml", "debug: true\n", "{file}:1: debug is not allowed in a file. Give --debug"),
        ("a.yaml", "seed: !!python/object/apply:os.getcwd []\n", "{file}:1: not YAML (could not determine a "
         "constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd')"),
        ("a.json", '{"seed": 1,\n"bf16" true}', "{file}:2: not JSON (Expecting ':' delimiter: line 2 column 8 "
         "(char 19)). Write one object of flags and values"),
        ("a.txt", "", "--config {file}: not a .yaml, .yml, .json file. Rename the file"),
    ],
)  # fmt: skip
def test_invalid_file_is_refused_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_args(["--config", str(file)])
    assert str(caught.value) == message.replace("{file}", str(file))


def test_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--config nowhere\.yaml: no such file or directory\. Check the path$"):
        parse_args(["nowhere.yaml"])


# --------------------------------------------------------------------------------------------------------------- record


def test_a_run_does_not_change_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def keep(argv: list[str]) -> object:
        seen.append(parse_args(argv))
        seen.append(copy.deepcopy(seen[0].to_dict()))
        return seen[0]

    monkeypatch.setattr("finetune.parse_args", keep)
    data = write_conversations(tmp_path / "train.json")
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--eval_data_path", data, "--output_dir", tmp_path / "out",
        "--use_lora", "--max_steps", 2, "--eval_strategy", "steps", "--eval_steps", 1, "--gradient_checkpointing",
        "--save_strategy", "no",
    )  # fmt: skip
    args, before = seen
    assert args.to_dict() == before
    assert args.lora.lora_target_modules is None
    assert json.loads((tmp_path / "out" / "run_args.json").read_text()) == before


def test_record_contains_all_flags() -> None:
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


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--use_lora --lora_target_modules w1 --warmup_ratio 1 --label_names labels --debug underflow_overflow",
        "--lr_scheduler_kwargs {} --report_to tensorboard wandb --optim_target_modules a b --eval_steps 0.1",
    ],
)
def test_record_parses_to_the_same_arguments(tmp_path: Path, flags: str) -> None:
    recorded = parse_args([*flags.split(), "--hub_token", "secret", "--resume_from_checkpoint", "x"]).to_dict()
    assert "secret" not in json.dumps(recorded)
    (tmp_path / "run_args.json").write_text(json.dumps(recorded))
    again = parse_args(["--config", str(tmp_path / "run_args.json")])
    assert again.to_dict() == recorded
    assert resumed_checkpoint(again) is None
