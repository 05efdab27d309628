"""Rank files to fast tokenizers and back: equal ids for every text, equal rank files."""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from chat.families import QWEN_V1
from chat.render import render, render_prompt, text_of
from chat.turns import Turn
from checkpoints.files import load_json, save_json
from errors import ConfigError
from export.layouts.tokenizer import CONTROL_TOKENS, save_fast_tokenizer, save_rank_tokenizer
from loading.chat_family import chat_family
from qwen_model.prompts import SPECIAL_TOKENS
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.golden import Golden
from tests.models import TINY, change_json, copy_checkpoint


def convert(source: Path, target: Path) -> Any:
    target.mkdir()
    save_fast_tokenizer(source, target)
    return AutoTokenizer.from_pretrained(target)


@pytest.fixture(scope="module")
def fast(any_golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return convert(any_golden.tiny, tmp_path_factory.mktemp("fast") / "out")


def test_ids_are_equal_for_all_recorded_strings(any_golden: Golden, fast: Any, tiny_tokenizer: QWenTokenizer) -> None:
    texts = [case["text"] for case in any_golden.load_json("tokenizer.json")["strings"] if not case["lone_surrogate"]]
    assert len(texts) > 50
    for text in texts:
        # As in Qwen2's tokenizers, the text of a ChatML control token is encoded as that token.
        expected = tiny_tokenizer(text, allowed_special=set(CONTROL_TOKENS)).input_ids
        assert fast(text).input_ids == expected, text
        assert fast(text, split_special_tokens=True).input_ids == tiny_tokenizer(text).input_ids, text
        for skip in (False, True):
            decoded = tiny_tokenizer.decode(expected, skip_special_tokens=skip)
            assert fast.decode(expected, skip_special_tokens=skip) == decoded, text


def test_ids_are_equal_for_random_strings(fast: Any, tiny_tokenizer: QWenTokenizer) -> None:
    """Alphabets of letters that merge often, so that most orders of merges occur."""
    draw = random.Random(0)
    alphabets = [
        "ab ",
        "aeinst",
        " \n\r\t",
        "的一是不了人我在有他",
        "0123456789,.",
        "'sStTlLrR ",
        "e\u0301\u0327a\u0300ä ",
        "👩\u200d👧🏽é€",
    ]
    for _ in range(3000):
        letters = "".join(draw.sample(alphabets, draw.randint(1, 3)))
        text = "".join(draw.choices(letters, k=draw.randint(1, 40)))
        assert fast(text).input_ids == tiny_tokenizer.encode_plain(text), repr(text)


def test_every_token_keeps_its_id(fast: Any, tiny_tokenizer: QWenTokenizer) -> None:
    assert len(fast) == len(tiny_tokenizer)
    for token, id_ in tiny_tokenizer.special_tokens.items():
        assert fast.convert_tokens_to_ids(token) == id_
    end = tiny_tokenizer.special_tokens
    assert (fast.eos_token_id, fast.pad_token_id) == (end["<|im_end|>"], end["<|endoftext|>"])
    assert (fast.bos_token, fast.model_max_length) == (None, tiny_tokenizer.model_max_length)


def test_only_three_control_tokens_are_recognised_in_text(fast: Any, tiny_tokenizer: QWenTokenizer) -> None:
    for token in SPECIAL_TOKENS:
        ids = fast(f"a {token}b").input_ids
        specials = [id_ for id_ in ids if id_ in tiny_tokenizer.special_tokens.values()]
        assert len(specials) == (1 if token in CONTROL_TOKENS else 0), token


def test_conversion_takes_less_than_30_seconds(any_golden: Golden, tmp_path: Path) -> None:
    start = time.monotonic()
    save_fast_tokenizer(any_golden.tiny, tmp_path)
    assert time.monotonic() - start < 30, "about 3 seconds on an idle machine"


def test_chat_template_renders_like_qwen_v1(fast: Any) -> None:
    conversations = [
        [Turn("user", "Hi")],
        [Turn("system", " Be short. "), Turn("user", "\nHi\n"), Turn("assistant", "Hello"), Turn("user", "<b>")],
    ]
    for turns in conversations:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        prompt = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt == text_of(render_prompt(turns, QWEN_V1))
        assert fast.apply_chat_template(messages, tokenize=False) == text_of(render(turns, QWEN_V1))
    assert chat_family("qwen2", fast).default_system == QWEN_V1.default_system


def test_existing_chat_template_is_kept(tmp_path: Path) -> None:
    source = copy_checkpoint(tmp_path / "source")
    own = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (source / "chat_template.jinja").write_text(own)
    assert convert(source, tmp_path / "out").chat_template == own
    (source / "chat_template.jinja").unlink()
    save_json(load_json(source / "tokenizer_config.json") | {"chat_template": own}, source / "tokenizer_config.json")
    assert convert(source, tmp_path / "again").chat_template == own


def test_rank_file_round_trip(any_golden: Golden, tmp_path: Path) -> None:
    save_fast_tokenizer(any_golden.tiny, tmp_path)
    save_rank_tokenizer(tmp_path, tmp_path)
    assert (tmp_path / "qwen.tiktoken").read_bytes() == (any_golden.tiny / "qwen.tiktoken").read_bytes()
    assert not (tmp_path / "qwen_extra.tiktoken").exists()
    assert QWenTokenizer.from_pretrained(tmp_path).model_max_length == 32768


def with_extra_ranks(folder: Path, tokens: list[str]) -> Path:
    source = copy_checkpoint(folder)
    first = len(QWenTokenizer.from_pretrained(source))
    lines = [f"{base64.b64encode(token.encode()).decode()} {first + index}\n" for index, token in enumerate(tokens)]
    (source / "qwen_extra.tiktoken").write_text("".join(lines))
    return source


def test_extra_ranks_are_converted(tmp_path: Path) -> None:
    """Some words have parts of higher rank than their own, or parts that are no tokens."""
    words = ["一只猫", "只猫", "是一只猫", "我是一只猫", " lantern boats", "zqzqzq", "boats in", "qzqz"]
    source = with_extra_ranks(tmp_path / "source", words)
    slow, fast = QWenTokenizer.from_pretrained(source), convert(source, tmp_path / "fast")
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(
            draw.choices([*words, "我", "是", "一", "只", "猫", " ", "zq", "q", " boats"], k=draw.randint(1, 8))
        )
        assert fast(text).input_ids == slow.encode_plain(text), text
    assert fast("我是一只猫").input_ids == [len(slow) - 5]
    assert len(fast) == len(slow)
    save_rank_tokenizer(tmp_path / "fast", tmp_path / "fast")
    for name in ("qwen.tiktoken", "qwen_extra.tiktoken"):
        assert (tmp_path / "fast" / name).read_bytes() == (source / name).read_bytes()


def test_merges_written_as_strings_are_read(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "fast")
    content = load_json(tmp_path / "fast" / "tokenizer.json")
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    save_json(content, tmp_path / "fast" / "tokenizer.json")
    assert Tokenizer.from_file(str(tmp_path / "fast" / "tokenizer.json")).get_vocab_size() == 908
    save_rank_tokenizer(tmp_path / "fast", tmp_path)
    assert (tmp_path / "qwen.tiktoken").read_bytes() == (TINY / "qwen.tiktoken").read_bytes()


# ----------------------------------------------------------------------------------------------------------- bad input


def add_token(content: dict[str, Any]) -> None:
    last = max(content["model"]["vocab"].values())
    content["added_tokens"].append({"id": last + 1, "content": "<tool_call>", "special": False})


def swap_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[3], merges[200] = merges[200], merges[3]


def drop_end(content: dict[str, Any]) -> None:
    content["added_tokens"] = []
    del content["model"]["vocab"]["<|endoftext|>"]


def split_differently(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_token, "<tool_call> has the id 908; in Qwen v1's tokenizer it has another or none"),
        (swap_merges, "its merges differ from those implied by the order of its tokens"),
        (drop_end, "is not a byte-level BPE with Qwen's tokens"),
        (split_differently, "splits texts differently from Qwen v1's tokenizer"),
        (lambda content: content.pop("model"), "model is missing"),
    ],
)
def test_tokenizer_that_rank_files_cannot_express_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    convert(TINY, tmp_path / "fast")
    content = load_json(tmp_path / "fast" / "tokenizer.json")
    change(content)
    (tmp_path / "fast" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        save_rank_tokenizer(tmp_path / "fast", tmp_path)


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"qwen\.tiktoken"):
        save_fast_tokenizer(tmp_path / "empty", tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        save_rank_tokenizer(tmp_path / "empty", tmp_path)


@pytest.mark.parametrize("form", ["files", "list"])
def test_named_chat_templates_are_kept_in_both_directions(tmp_path: Path, form: str) -> None:
    folders = [copy_checkpoint(tmp_path / "v1"), tmp_path / "fast", tmp_path / "back"]
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    if form == "list":
        listed = [{"name": name, "template": template} for name, template in templates.items()]
        change_json(folders[0] / "tokenizer_config.json", chat_template=listed)
    else:
        (folders[0] / "chat_template.jinja").write_text(templates["default"])
        (folders[0] / "additional_chat_templates").mkdir()
        (folders[0] / "additional_chat_templates" / "tool_use.jinja").write_text(templates["tool_use"])
    for source, target, convert in zip(folders, folders[1:], (save_fast_tokenizer, save_rank_tokenizer), strict=False):
        target.mkdir()
        convert(source, target)
        assert AutoTokenizer.from_pretrained(target).chat_template == templates
