"""docs/migrating.md and docs/faq.md: snippets run, data is read, commands are parsed, and all flags exist."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from data_utils.formats import recognise
from qwen_model.register import register_qwen
from tests.documents import Block, Command, blocks_in, commands_in
from tests.golden import REPO
from tests.models import change_json, copy_checkpoint
from training.config.args import GROUPS
from training.config.flags import flags_of
from training.config.old_flags import OLD_FLAGS
from training.config.parsing import parse_args
from training.config.synonyms import explain_missing, flag_meant
from training.config.trainer_flags import trainer_flags

MIGRATING, FAQ = REPO / "docs" / "migrating.md", REPO / "docs" / "faq.md"
BLOCKS = blocks_in(MIGRATING)
FINETUNE = {name for group in GROUPS.values() for name in flags_of(group)} | {*trainer_flags(), *OLD_FLAGS, "config"}
OF_VLLM = {"max-lora-rank"}
# Tables whose first cell has keys of another tool and whose second has what they are here.
TOOLS = ("LLaMA-Factory", "ms-swift", "axolotl", "TRL")
ROUNDS = {"system": "Be brief.", "conversation": [{"human": "Hi", "assistant": "Hello!"}]}


def of_language(language: str) -> Any:
    blocks = [block for block in BLOCKS if block.language == language]
    return pytest.mark.parametrize("block", blocks, ids=lambda block: block.place)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the snippets and commands name."""
    folder = tmp_path_factory.mktemp("migrating")
    model = copy_checkpoint(folder / "Qwen-7B-Chat")
    # Ids without a token, which random weights choose.
    change_json(model / "generation_config.json", max_new_tokens=4, suppress_tokens=list(range(908, 960)))
    register_qwen()
    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    )
    lora.peft_config["default"].base_model_name_or_path = "Qwen-7B-Chat"
    lora.save_pretrained(folder / "output" / "adapter")
    (folder / "rounds.jsonl").write_text(json.dumps(ROUNDS) + "\n")
    (folder / "OUT").mkdir()
    (folder / "OUT" / "run_args.json").write_text('{"seed": 1}')
    (folder / "run.yaml").write_text("seed: 1\n")
    return folder


@of_language("python")
def test_a_snippet_runs(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(block.text, block.place, "exec"), {})
    if "rounds.jsonl" in block.text:
        record = json.loads((folder / "conversations.jsonl").read_text(encoding="utf-8"))
        roles = [turn.role for turn in recognise(record, block.place).parse(record, block.place).turns]
        assert roles == ["system", "user", "assistant"]
    if "new_model_directory" in block.text:
        assert (folder / "new_model_directory" / "model.safetensors").is_file()


@of_language("jsonl")
def test_data_of_other_tools_is_read(block: Block) -> None:
    for number, line in enumerate(block.text.splitlines(), 1):
        place = f"{block.place}, line {number}"
        record = json.loads(line)
        conversation = recognise(record, place).parse(record, place)
        assert conversation.turns[-1].role in ("assistant", "text") and not conversation.notes, place
        assert sum(turn.role == "system" for turn in conversation.turns) == int('"Be brief."' in line), place


@of_language("yaml")
def test_a_file_of_flags_is_accepted(block: Block, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(block.text)
    assert parse_args([str(tmp_path / "run.yaml")]).output_dir


def parse_words(words: Sequence[str]) -> None:
    """Parse the words of a command as its program does; raises or exits for what it refuses."""
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    program, arguments = words[1], words[2:]
    if words[0] in ("sh", "bash"):
        assert (REPO / program).is_file()
        if program.startswith("finetune/"):
            end = arguments.index("--") if "--" in arguments else len(arguments)
            assert {word for word in arguments[:end] if word.startswith("-")} <= {"-m", "-d", "-o", "--preview"}
            parse_args(arguments[end + 1 :])
    elif program == "finetune.py":
        parse_args(arguments)
    elif program == "merge_lora.py":
        importlib.import_module("merge_lora").parse_args(arguments)
    else:
        assert program == "-m", words
        parsed = importlib.import_module(arguments[0]).parse_args(arguments[1:])
        if isinstance(parsed, tuple):  # the rest are flags of finetune.py
            parse_args(parsed[1])


COMMANDS = [command for document in (MIGRATING, FAQ) for command in commands_in(document)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.place)
def test_a_command_is_parsed_by_its_program(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if command.text.startswith("pip install"):
        assert all((REPO / name).is_file() for name in re.findall(r"-[rc] (\S+)", command.text))
        return
    monkeypatch.chdir(folder)
    parse_words(shlex.split(command.text))


def flags_of_programs(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return the flags that the programs print as their help, and those of finetune.py."""
    for module in ("merge_lora", *(f"scripts.{path.stem}" for path in (REPO / "scripts").glob("[a-z]*.py"))):
        if parse := getattr(importlib.import_module(module), "parse_args", None):
            with pytest.raises(SystemExit):
                parse(["--help"])
    return FINETUNE | set(re.findall(r"--([a-z][\w-]*)", capsys.readouterr().out))


def test_every_flag_that_is_named_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = flags_of_programs(capsys)
    migrating = [line.removesuffix(" |").rpartition(" | ")[2] for line in MIGRATING.read_text("utf-8").splitlines()]
    texts = {MIGRATING: "\n".join(migrating), FAQ: FAQ.read_text("utf-8")}
    for document, text in texts.items():
        named = {name for span in re.findall(r"`([^`]+)`", text) for name in re.findall(r"--([a-z][\w-]*)", span)}
        assert named - known - OF_VLLM == set(), document.name


def rows_of_tools() -> list[tuple[str, str]]:
    rows, tool = [], None
    for line in MIGRATING.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split(" | ")] if line.startswith("| ") else []
        if len(cells) != 2:
            tool = tool if line.startswith("|---") else None
        elif tool is None:
            tool = cells[0].strip("| ") if cells[0].strip("| ") in TOOLS else ""
        elif tool:
            rows.append((cells[0].strip("| "), cells[1].strip("| ")))
    return rows


@pytest.mark.parametrize(("there", "here"), rows_of_tools(), ids=lambda cell: cell[:30])
def test_hints_for_keys_of_other_tools_agree_with_the_table(there: str, here: str) -> None:
    """A key on our command line is refused with the flag that the table names."""
    for key in re.findall(r"`([a-z]\w+)(?::[^`]*)?`", there):
        if meant := flag_meant(key):
            assert f"--{meant}" in here, key
        elif key in FINETUNE:
            assert f"--{key}" in here or here.startswith(("the same", "refused")), key
        else:
            assert explain_missing(key) or "none" in here or "no flag" in here, f"{key} has no hint in synonyms.py"
