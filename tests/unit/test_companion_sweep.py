"""Every command that reads a folder refuses a companion file that leads out of it."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest

from tests.commands import names_in, run_here
from tests.golden import SMALL
from tests.models import TINY, write_conversations

_RUN = "--model_name_or_path {in}/model --data_path {in}/train.jsonl"
COMMANDS = {
    "finetune": ("finetune", f"{_RUN} --use_lora --use_cpu True --output_dir {{out}}", "model"),
    "merge of a base": ("merge_lora", "--adapter {in}/adapter --base {in}/model --output {out}", "model"),
    "merge of an adapter": ("merge_lora", "--adapter {in}/adapter --base {in}/model --output {out}", "adapter"),
    "quantize": ("scripts.quantize", f"{_RUN} --output_dir {{out}}", "model"),
    "convert_layout": ("scripts.convert_layout", "{in}/model {out}", "model"),
    "convert_layout of an adapter": ("scripts.convert_layout", "{in}/adapter {out}", "adapter"),
    "ask": ("scripts.ask", "--model_name_or_path {in}/model Hello", "model"),
}


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "generation_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("command", COMMANDS)
def test_companion_that_leads_out_of_its_folder_is_refused(
    tmp_path: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module, words, folder = COMMANDS[command]
    inputs = tmp_path / "in"
    shutil.copytree(TINY, inputs / "model")
    shutil.copytree(SMALL / "training" / "lora_chat_adapter", inputs / "adapter")
    write_conversations(inputs / "train.jsonl")
    (inputs / "secret").write_text('{"eos_token": "secret"}')
    (inputs / folder / name).unlink(missing_ok=True)
    (inputs / folder / name).symlink_to(inputs / "secret")
    filled = [word.replace("{in}", str(inputs)).replace("{out}", str(tmp_path / "out")) for word in words.split()]
    assert run_here(importlib.import_module(module).main, module, filled) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"{inputs / folder / name} leads out of its folder, to {inputs / 'secret'}. Put a copy" in message
    assert names_in(tmp_path) == ["in"]
