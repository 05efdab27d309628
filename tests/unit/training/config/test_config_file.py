"""YAML and JSON files of flags."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from console import python_command
from errors import ConfigError
from training.checks import check_args
from training.config.parsing import parse_args

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
HELP = python_command("finetune.py --help_all")
UNKNOWN = "{file}:2: unknown flag use_lorra (did you mean use_lora?). " + f"{HELP} lists the flags"


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
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}  # the default without LoRA
    assert changed.to_dict() == expected | batch | {"learning_rate": 1e-3, "warmup_steps": 3.0, "use_lora": False}


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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "[" * 100_000, "--config {file}: nested too deeply. Write flag: value, one per line"),
        ("a.json", '{"seed": ' + "[" * 100_000, "--config {file}: nested too deeply. Write flag: value, one per line"),
        ("a.yaml", "seed: " + "[" * 100_000, "--config {file}: nested too deeply. Write flag: value, one per line"),
        ("a.yaml", "data_path: &a [x.json]\neval_data_path: *a\n", "{file}:2: not YAML (aliases are not supported: "
         "repeat the value)"),
        ("a.yaml", "seed: 1\nlora_r: !!int many\n", "{file}:2: not YAML (invalid literal for int() with base 10: "
         "'many'). Write flag: value, one per line"),
        ("a.yaml", "run_name: !!timestamp 2024-01-01\n", "{file}:1: run_name: a date is no value of a flag. "
         "Write flag: value, one per line"),
        ("a.yaml", "run_name: !!binary aGk=\n", "{file}:1: run_name: a bytes is no value of a flag. "
         "Write flag: value, one per line"),
        ("a.yaml", "deepspeed: {1: 2}\n", "{file}:1: deepspeed: an object with a key that is no text is no value of a "
         "flag. Write flag: value, one per line"),
        ("a.yaml", "lora_r: {a: b}\n", '{file}:1: lora_r: {"a": "b"}: expected a whole number'),
        ("a.yaml", "learning_rate: [1e-4]\n", "{file}:1: learning_rate: [0.0001]: expected a number"),
        ("a.json", '{"use_lora": {}}', "{file}:1: use_lora: {}: expected true or false"),
        ("a.json", '{"data_path": null, "seed": 1e999}', "{file}:1: seed: Infinity: expected a whole number"),
        ("a.yaml", "run_name:\n  a: b\n", '{file}:1: run_name: {"a": "b"}: expected a string'),
        ("a.yaml", "? [a, b]\n: 1\n",
         "{file}:1: unknown flag ['a', 'b']. python finetune.py --help_all lists the flags"),
        ("a.yaml", "", "{file}:1: not a mapping. Write flag: value, one per line"),
        ("a.json", "", "{file}:1: not JSON (Expecting value: line 1 column 1 (char 0)). "
         "Write one object of flags and values"),
        ("a.yaml", "x: " + "a" * 2**20, "--config: {file} is larger than 1,048,576 bytes, the limit for this file. "
         "Copy the file again"),
    ],
)  # fmt: skip
def test_values_that_no_flag_has_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_args(["--config", str(file)])
    assert str(caught.value).replace(python_command("finetune.py"), "python finetune.py") == message.replace(
        "{file}", str(file)
    )


@pytest.mark.parametrize("flag", ["--config", "--deepspeed", "--fsdp_config", "--accelerator_config"])
def test_a_pipe_or_folder_is_not_read(flag: str, tmp_path: Path) -> None:
    pipe, folder = tmp_path / "pipe.json", tmp_path / "folder.json"
    os.mkfifo(pipe)
    folder.mkdir()
    for path, what in ((pipe, "a named pipe"), (folder, "a folder")):
        with pytest.raises(ConfigError) as caught:
            args = parse_args([flag, str(path), *(["--fsdp"] if flag == "--fsdp_config" else [])])
            check_args(args)
        assert f"{flag}: {path} is {what}, not a file. " in str(caught.value)


def test_files_in_another_encoding(tmp_path: Path) -> None:
    """A name in GBK, as on an old system, and a file that contains GBK."""
    file = tmp_path / os.fsdecode("微调".encode("gbk") + b".yaml")
    file.write_text("seed: 3\n")
    assert parse_args([str(file)]).trainer["seed"] == 3
    assert json.loads(json.dumps(parse_args(["--run_name", str(file)]).to_dict()))["run_name"] == str(file)
    file.write_bytes("system_message: 你好\n".encode("gbk"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        parse_args([str(file)])
