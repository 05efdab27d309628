"""The command line of finetune.py: the original's flags, transformers' flags, and what is refused."""

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


def test_the_originals_flags_and_their_defaults() -> None:
    args = parse_args([])
    assert args.model.model_name_or_path == "Qwen/Qwen-7B"
    assert (args.data.data_path, args.data.eval_data_path, args.data.lazy_preprocess) == (None, None, False)
    lora = args.lora
    assert (lora.use_lora, lora.q_lora, lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (False, False, 64, 16, 0.05)
    assert (lora.lora_target_modules, lora.lora_weight_path, lora.lora_bias) == (None, "", "none")
    assert (args.data.model_max_length, args.model.cache_dir) == (8192, None)
    assert build_training_arguments(args).optim == "adamw_torch_fused"


def test_our_flags_and_their_defaults() -> None:
    args = parse_args([])
    assert (args.lora.trainable_embeddings, args.data.label_mask, args.data.system_message) == (
        "auto",
        "assistant",
        None,
    )
    assert (args.options.pure_bf16, args.model.attn_implementation) == (False, None)


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
def test_forms_of_a_switch_that_is_on(form: str) -> None:
    assert parse_args(form.split()).lora.use_lora is True


@pytest.mark.parametrize("form", ["--use_lora False", "--use_lora=false", ""])
def test_forms_of_a_switch_that_is_off(form: str) -> None:
    assert parse_args(form.split()).lora.use_lora is False


def test_bf16_works_without_a_gpu() -> None:
    for form in (["--bf16"], ["--bf16", "True"]):
        training = build_training_arguments(parse_args(form))
        assert training.bf16 is True
        assert training.use_cpu is not torch.cuda.is_available()


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ("--use_lorra", "--use_lorra is no known flag, the nearest is --use_lora."),
        ("--use_lor", "--use_lor is no known flag, the nearest is --use_lora."),  # not guessed from its start
        ("--bf 16", "--bf is no known flag, the nearest is --bf16."),
        ("--evaluation_stratgy no", "--evaluation_stratgy is no known flag, the nearest is --evaluation_strategy."),
        ("--xyzzy", "--xyzzy is no known flag."),
        ("stray", "stray is no known flag."),
        ("--lora_r many", "--lora_r many: a whole number is wanted."),
        ("--learning_rate fast", "--learning_rate fast: a number is wanted."),
        ("--lora_bias some", "--lora_bias some: one of none, all, lora_only is wanted."),
        ("--label_mask user", "--label_mask user: one of assistant, qwen, last, all is wanted."),
        ("--use_lora perhaps", "--use_lora perhaps: true or false is wanted."),
        ("--data_path", "argument --data_path: expected at least one argument."),
        ("--optim adamw_torhc", "--optim adamw_torhc: no such value; the nearest is adamw_torch."),
        ("--eval_strategy epcoh", "--eval_strategy epcoh: one of no, steps, epoch is wanted; the nearest is epoch."),
        ("--log_level loud",
         "--log_level loud: one of debug, detail, info, warning, error, critical, passive is wanted."),
    ],
)  # fmt: skip
def test_what_is_refused_is_named_in_one_line(command_line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(command_line.split())
    assert str(caught.value) == f"command line: {message} python finetune.py --help lists the flags"


def test_other_forms_of_flags() -> None:
    """As transformers' own parser takes them: dashes, and --no_ for what is on by default."""
    words = ["--learning-rate=1e-4", "--no_remove_unused_columns", "--report-to", "none"]
    training = build_training_arguments(parse_args(words))
    assert (training.learning_rate, training.remove_unused_columns, training.report_to) == (1e-4, False, [])


def test_what_transformers_refuses_together_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^command line: .*torch_empty_cache_steps"):
        build_training_arguments(parse_args(["--torch_empty_cache_steps", "0"]))


def test_debug_is_ours_and_transformers() -> None:
    for words, debug, theirs in (
        ([], False, []), (["--debug"], True, []), (["--debug", "False"], False, []),
        (["--debug", "underflow_overflow"], False, ["underflow_overflow"]),
    ):  # fmt: skip
        args = parse_args(words)
        assert (args.debug, [option.value for option in build_training_arguments(args).debug]) == (debug, theirs)


def test_a_sample_is_by_default_not_longer_than_the_model_can_take(tmp_path: Path) -> None:
    assert parse_args(["--model_name_or_path", str(TINY)]).data.model_max_length == 2048
    assert parse_args(["--model_name_or_path", str(TINY), "--model_max_length", "9"]).data.model_max_length == 9
    assert parse_args(["--model_name_or_path", str(tmp_path / "nowhere")]).data.model_max_length == 8192


def test_the_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_an_old_name_means_what_it_meant(old: str, flag: str, value: object) -> None:
    args = parse_args(old.split())
    assert args.trainer_value(flag) == value
    assert getattr(build_training_arguments(args), flag) == value
    assert args.to_dict()[flag] == value


@pytest.mark.parametrize(("ratio", "steps"), [("0", 0), ("0.01", 2), ("0.5", 76), ("1", 151), ("1.0", 151)])
def test_warmup_ratio_is_a_share_of_all_steps_also_where_it_is_one(ratio: str, steps: int) -> None:
    assert build_training_arguments(parse_args(["--warmup_ratio", ratio])).get_warmup_steps(151) == steps


@pytest.mark.parametrize("ratio", ["1.5", "-0.1"])
def test_a_warmup_ratio_that_is_no_share(ratio: str) -> None:
    with pytest.raises(ConfigError, match=f"^--warmup_ratio {ratio}: a share from 0 to 1 is wanted$"):
        parse_args(["--warmup_ratio", ratio])


@pytest.mark.parametrize(
    "words",
    [
        "--save_safetensors", "--save_safetensors True", "--fp16_backend auto", "--half_precision_backend cuda_amp",
        "--fp16_opt_level O2", "--tpu_num_cores 8", "--use_mps_device", "--past_index -1", "--use_ipex False",
        "--include_tokens_per_second", "--ray_scope last",
    ],
)  # fmt: skip
def test_an_old_flag_that_had_no_effect_is_accepted_and_said(words: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="training"):
        assert parse_args(words.split()).to_dict() == parse_args([]).to_dict()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"{words.split()[0]} has no effect"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--save_safetensors False", "--save_safetensors False is not possible: weights are only saved as safetensors, "
         "because a pickle can run code when it is read. Leave it out"),
        ("--half_precision_backend apex", "--half_precision_backend apex is not possible: mixed precision is torch's "
         "own autocast. Leave it out"),
        ("--sharded_ddp simple", "--sharded_ddp simple is not possible: transformers no longer works with fairscale. "
         "Leave it out"),
        ("--evaluation_strategy no --eval_strategy no", "--evaluation_strategy and --eval_strategy are the same thing. "
         "Give one of the two"),
        ("--warmup_steps 10 --warmup_ratio 0.1", "--warmup_ratio and --warmup_steps are the same thing. "
         "Give one of the two"),
        ("--activation_checkpointing --gradient_checkpointing", "--activation_checkpointing and "
         "--gradient_checkpointing are the same thing. Give one of the two"),
    ],
)  # fmt: skip
def test_old_flags_that_are_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(words.split())
    assert str(caught.value) == message


# --------------------------------------------------------------------------------------------------------- config files


YAML = """\
# a comment
use_lora: true
eval_strategy: no      # a text, not false
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
def test_a_file_of_flags(tmp_path: Path, name: str, text: str) -> None:
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
    # The command line wins, by whichever name.
    changed = parse_args(
        ["--learning_rate", "1e-3", "--config", str(file), "--warmup_steps", "3", "--use_lora", "False"]
    )
    assert changed.to_dict() == expected | {"learning_rate": 1e-3, "warmup_steps": 3.0, "use_lora": False}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "seed: 1\nuse_lorra: true\n", "{file}:2: use_lorra is no known flag. Did you mean use_lora?"),
        ("a.json", '{"seed": 1,\n "use_lorra": true}', "{file}:2: use_lorra is no known flag. Did you mean use_lora?"),
        ("a.yaml", "seed: 1\n\nlora_r: many\n", "{file}:3: lora_r: many: a whole number is wanted"),
        ("a.json", '{"seed": 1,\n\n"lora_r": 8.5}', "{file}:3: lora_r: 8.5: a whole number is wanted"),
        ("a.json", '{"bf16": 1}', "{file}:1: bf16: 1: true or false is wanted"),
        ("a.yaml", "lora_r:\n", "{file}:1: lora_r: null: a whole number is wanted"),
        ("a.yaml", "run_name: 2024\n", "{file}:1: run_name: 2024: a text is wanted"),
        ("a.yaml", "lora_target_modules: [1, 2]\n", "{file}:1: lora_target_modules: [1, 2]: a list of texts is wanted"),
        ("a.yaml", "seed: 1\nseed: 2\n", "{file}:2: seed is given a second time. Keep one of the two"),
        ("a.json", '{"seed": 1,\n"seed": 2}', "{file}:2: seed is given a second time. Keep one of the two"),
        ("a.yaml", "evaluation_strategy: 'no'\neval_strategy: 'no'\n",
         "{file}:1: --evaluation_strategy and --eval_strategy are the same thing. Give one of the two"),
        ("a.yaml", "seed: 1\nsave_safetensors: false\n", "{file}:2: --save_safetensors False is not possible: weights "
         "are only saved as safetensors, because a pickle can run code when it is read. Leave it out"),
        ("a.yaml", "- seed\n", "{file}:1: not a mapping. Write flag: value, one per line"),
        ("a.json", "[1]", '{file}:1: not an object. Write {"flag": value, ...}'),
        ("a.yaml", "seed: [1\nx: 2\n", "{file}:2: not YAML (expected ',' or ']', but got ':')"),
        ("a.yaml", "debug: true\n", "{file}:1: debug is not allowed in a file. Give --debug"),
        ("a.yaml", "seed: !!python/object/apply:os.getcwd []\n", "{file}:1: not YAML (could not determine a "
         "constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd')"),
        ("a.json", '{"seed": 1,\n"bf16" true}', "{file}:2: not JSON (Expecting ':' delimiter: line 2 column 8 "
         "(char 19)). Write one object of flags and values"),
        ("a.txt", "", "--config {file}: not a .yaml, .yml, .json file. Give the file one of these endings"),
    ],
)  # fmt: skip
def test_a_file_that_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_args(["--config", str(file)])
    assert str(caught.value) == message.replace("{file}", str(file))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"^--config nowhere\.yaml: no such file or directory\. Check the path$"):
        parse_args(["nowhere.yaml"])


# --------------------------------------------------------------------------------------------------------------- record


def test_nothing_changes_the_arguments_after_parsing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def keep(argv: list[str]) -> object:
        seen.append(parse_args(argv))
        seen.append(copy.deepcopy(seen[0].to_dict()))
        return seen[0]

    monkeypatch.setattr("training.config.parsing.parse_args", keep)
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


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--use_lora --lora_target_modules w1 --warmup_ratio 1 --label_names labels --debug underflow_overflow",
        "--lr_scheduler_kwargs {} --report_to tensorboard wandb --optim_target_modules a b --eval_steps 0.1",
    ],
)
def test_the_record_starts_the_same_run_again(tmp_path: Path, flags: str) -> None:
    recorded = parse_args([*flags.split(), "--hub_token", "secret", "--resume_from_checkpoint", "x"]).to_dict()
    assert "secret" not in json.dumps(recorded)
    (tmp_path / "run_args.json").write_text(json.dumps(recorded))
    again = parse_args(["--config", str(tmp_path / "run_args.json")])
    assert again.to_dict() == recorded
    assert resumed_checkpoint(again) is None
