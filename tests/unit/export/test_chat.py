"""Chat files of an exported folder: the template equals the renderer, and answers end at the right tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from chat.families import QWEN_V1
from chat.render import encode_prompt, render, render_prompt, text_of
from chat.stops import end_ids_of, stopping_generation_config
from chat.template import CHATML_TEMPLATE
from chat.turns import Turn
from errors import ConfigError
from export.chat import write_chat_template, write_generation_config
from loading.chat_family import chat_family
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.golden import Golden
from tests.models import CONVERSATIONS, TINY, copy_checkpoint, write_later_checkpoint

TEXTS = [
    "Hi",
    "\n leads",
    "  \n\n",
    "trails \n",
    "",
    "{{ messages }} {% x %}",
    "'\"\\n",
    "e\u0301 ñ 你好，世界 🙂",
    "a  b\tc",
]
TEXTS_IN_EVERY_TURN = [[("user", text), ("assistant", text), ("user", text)] for text in TEXTS]
TEXTS_AS_SYSTEM = [[("system", text), ("user", "Hi")] for text in TEXTS]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def messages(conversation: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in conversation]


# ---------------------------------------------------------------------------------------------------- chat template


@pytest.mark.parametrize("conversation", [*CONVERSATIONS, *TEXTS_IN_EVERY_TURN, *TEXTS_AS_SYSTEM], ids=str)
def test_template_equals_renderer(tiny_tokenizer: QWenTokenizer, conversation: Any) -> None:
    turns = [Turn(role, text) for role, text in conversation]
    for is_prompt, rendered in ((False, render(turns, QWEN_V1)), (True, render_prompt(turns, QWEN_V1))):
        arguments = {"chat_template": CHATML_TEMPLATE, "add_generation_prompt": is_prompt}
        text = tiny_tokenizer.apply_chat_template(messages(conversation), tokenize=False, **arguments)
        assert text == text_of(rendered)
        # Equal ids too, even if a text begins with a line break: header and text are tokenised separately.
        ids = tiny_tokenizer.apply_chat_template(messages(conversation), return_dict=True, **arguments)["input_ids"]
        assert ids == encode_prompt(rendered, tiny_tokenizer)


def test_template_refuses_tools(tiny_tokenizer: QWenTokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    with pytest.raises(Exception, match="does not support tools"):
        tiny_tokenizer.apply_chat_template(
            messages([("user", "Hi")]), tools=tools, chat_template=CHATML_TEMPLATE, tokenize=False
        )


def test_template_is_detected_as_chatml_in_later_families(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write_later_checkpoint(tmp_path / "qwen2", "qwen2", CHATML_TEMPLATE)
    family = chat_family("qwen2", AutoTokenizer.from_pretrained(folder))
    assert (family.name, family.default_system, family.tool_form) == ("chatml", "You are a helpful assistant.", None)


def test_control_tokens_in_text_are_read_only_by_code_of_a_folder(tmp_path: Path) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>"
    ours = QWenTokenizer.from_pretrained(TINY)
    plain, control = ours.encode_plain(text), ours.encode(text, allowed_special="all")
    assert plain != control
    assert ours(text).input_ids == ours(text, split_special_tokens=True).input_ids == plain
    assert ours(text, split_special_tokens=False).input_ids == ours.encode(text, split_special_tokens=False) == control
    assert QWenTokenizer.from_pretrained(TINY, split_special_tokens=False)(text).input_ids == plain

    class FolderCode(QWenTokenizer):
        _auto_class = "AutoTokenizer"

    from_folder = FolderCode.from_pretrained(TINY, split_special_tokens=False)
    assert from_folder(text).input_ids == control and from_folder.encode_plain(text) == plain
    assert from_folder(text, split_special_tokens=True).input_ids == plain
    from_folder.save_pretrained(tmp_path / "from_folder")
    assert FolderCode.from_pretrained(tmp_path / "from_folder")(text).input_ids == control
    ours.save_pretrained(tmp_path / "ours")
    assert QWenTokenizer.from_pretrained(tmp_path / "ours")(text).input_ids == plain


def test_template_is_written_to_qwen_folders(tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path / "qwen")
    assert write_chat_template(folder)
    assert QWenTokenizer.from_pretrained(folder).chat_template == CHATML_TEMPLATE
    assert not write_chat_template(folder), "an existing template is kept"


def test_no_template_is_written_to_other_families(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Qwen v1's template would add a default system message, which Qwen3 without a template does not have."""
    folder = write_later_checkpoint(tmp_path / "qwen3", "qwen3")
    assert not write_chat_template(folder) and not (folder / "chat_template.jinja").exists()
    assert "no chat template is written" in caplog.text


def test_written_template_equals_the_format_that_qwen2_was_trained_in(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write_later_checkpoint(tmp_path / "qwen2", "qwen2")
    trained = chat_family("qwen2", AutoTokenizer.from_pretrained(folder))
    assert write_chat_template(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert chat_family("qwen2", tokenizer) == trained
    text = tokenizer.apply_chat_template(messages([("user", "Hi")]), tokenize=False, add_generation_prompt=True)
    assert text == text_of(render_prompt([Turn("user", "Hi")], trained))


@pytest.mark.parametrize("file_name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_existing_template_is_kept(tmp_path: Path, file_name: str) -> None:
    (tmp_path / file_name).write_text('{"chat_template": "mine"}')
    assert not write_chat_template(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file_name]


# ----------------------------------------------------------------------------------------------------- end of answers


@pytest.mark.parametrize(
    ("eos", "expected"),
    [(None, [7, 9]), (9, [7, 9]), (7, [7, 9]), ([9, 7], [7, 9]), ([5, 9], [7, 5, 9]), (5, [7, 5, 9])],
)
def test_both_end_tokens_come_before_and_after_other_eos_ids(eos: Any, expected: list[int]) -> None:
    config = {"top_p": 0.5, "do_sample": False} | ({} if eos is None else {"eos_token_id": eos})
    config_after = stopping_generation_config(config, [7, 9], "qwen2")
    assert config_after == {"top_p": 0.5, "do_sample": False, "eos_token_id": expected, "pad_token_id": 9}


def test_chat_keys_are_written_for_qwen_v1_only() -> None:
    keys = {"chat_format": "raw", "max_window_size": 100, "top_k": 3}
    config_after = stopping_generation_config(keys, [7, 9], "qwen")
    assert (config_after["chat_format"], config_after["max_window_size"], config_after["top_k"]) == ("chatml", 100, 3)
    assert stopping_generation_config({}, [7, 9], "qwen")["max_window_size"] == 6144
    assert stopping_generation_config(keys, [7, 9], "qwen2").keys() == {"top_k", "eos_token_id", "pad_token_id"}


def test_generation_config_of_qwen_v1_folder_ends_answers(any_golden: Golden, tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path / "qwen", any_golden.tiny, chat_format="raw")
    tokenizer = QWenTokenizer.from_pretrained(folder)
    write_generation_config(folder)
    before, after = read(any_golden.tiny / "generation_config.json"), read(folder / "generation_config.json")
    ends = [tokenizer.im_end_id, tokenizer.eod_id]
    assert ends == end_ids_of(tokenizer)
    assert after == before | {"eos_token_id": ends, "pad_token_id": ends[-1], "chat_format": "chatml"}
    (folder / "generation_config.json").unlink()
    write_generation_config(folder)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == ends


def test_generation_config_of_later_families_ends_answers(tmp_path: Path) -> None:
    folder = write_later_checkpoint(tmp_path / "qwen3", "qwen3")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1, "top_p": 0.8}')
    write_generation_config(folder)
    # 700 ranks, then end-of-text, im_start and im_end.
    assert read(folder / "generation_config.json") == {"eos_token_id": [702, 1, 700], "top_p": 0.8, "pad_token_id": 700}


@pytest.mark.parametrize("model_type", ["qwen", "qwen2"])
def test_generation_config_is_unchanged_without_a_tokenizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model_type: str
) -> None:
    folder = copy_checkpoint(tmp_path / "qwen", model_type=model_type)
    before = read(folder / "generation_config.json")
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        (folder / name).unlink()
    with caplog.at_level(logging.WARNING):
        write_generation_config(folder)
    assert "there is no tokenizer" in caplog.text
    assert read(folder / "generation_config.json") == before


def test_generation_config_is_unchanged_for_other_chat_formats(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_later_checkpoint(tmp_path / "qwen2", "qwen2")
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_end|>", "<|turn_end|>"))
    config = read(folder / "tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(config).replace("<|im_end|>", "<|turn_end|>"))
    before = read(folder / "generation_config.json")
    with caplog.at_level(logging.WARNING):
        write_generation_config(folder)
    assert "no ChatML" in caplog.text
    assert read(folder / "generation_config.json") == before


def test_broken_tokenizer_is_reported(tmp_path: Path) -> None:
    folder = write_later_checkpoint(tmp_path / "qwen2", "qwen2")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not JSON"):
        write_generation_config(folder)
