"""A folder's tokenizer gives the ids of its own file, whatever class transformers opens it with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2Tokenizer

from checkpoints.files import load_json, save_json
from errors import ConfigError
from loading.tokenizer import PROBES, load_tokenizer
from tests.bases import write_published
from tests.models import change_json

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
OF_GPT2 = BYTES | {"use_regex": True}
OF_LLAMA = {
    "type": "Split", "behavior": "Isolated", "invert": False,
    "pattern": {"Regex": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"},
}  # fmt: skip


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


FOREIGN: dict[str, dict[str, Any]] = {
    "no normaliser": {"normalizer": None},
    "GPT-2's split": {"pre_tokenizer": OF_GPT2},
    "numbers of three digits": {"pre_tokenizer": sequence(OF_LLAMA, BYTES)},
    "prefix space": {"pre_tokenizer": OF_GPT2 | {"add_prefix_space": True}},
    "lower case": {"normalizer": {"type": "Lowercase"}},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("base") / "base")


def write_foreign(published: Path, folder: Path, **parts: Any) -> Path:
    """Write the tokenizer with other parts, and with merges that make the difference visible in ids."""
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_bytes((published / name).read_bytes())
    fast = load_json(published / "tokenizer.json") | parts
    for pair in (["1", "2"], ["12", "3"], ["Ċ", "Ċ"], ["Ġ", "one"], ["Ġ", "two"]):
        if "".join(pair) not in fast["model"]["vocab"]:
            fast["model"]["vocab"]["".join(pair)] = 705 + len(fast["model"]["merges"])
            fast["model"]["merges"].append(pair)
    save_json(fast, folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize("name", FOREIGN)
def test_ids_of_a_foreign_tokenizer_are_those_of_its_file(
    published: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_foreign(published, tmp_path / "model", **FOREIGN[name])
    by_class, stated = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert isinstance(by_class, Qwen2Tokenizer), "transformers no longer replaces the class: this module is not needed"
    different = [text for text in PROBES if by_class(text).input_ids != stated.encode(text).ids]
    assert different, "no probe tells this tokenizer from Qwen's"
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(folder, "here")
    assert all(tokenizer(text).input_ids == stated.encode(text).ids for text in PROBES)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (by_class.eos_token, by_class.pad_token)
    assert f"other ids than its tokenizer.json for {len(different)} of {len(PROBES)} texts" in caplog.text


def test_a_tokenizer_like_qwens_is_loaded_once(
    published: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("loading.tokenizer.PreTrainedTokenizerFast", None)
    with caplog.at_level(logging.WARNING):
        assert isinstance(load_tokenizer(published, "here"), Qwen2Tokenizer)
    assert not caplog.messages


def test_a_foreign_tokenizer_is_loaded_once(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_foreign(published, tmp_path / "model", **FOREIGN["GPT-2's split"])
    monkeypatch.setattr("loading.tokenizer.AutoTokenizer", None)
    stated = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder, "here").backend_tokenizer.to_str() == stated.to_str()


def test_special_tokens_that_only_the_class_names_stay(published: Path, tmp_path: Path) -> None:
    """A hub's snapshot may lack tokenizer_config.json."""
    folder = write_foreign(published, tmp_path / "model", normalizer=None)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder, "here")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")


def test_file_in_another_order_is_read(published: Path, tmp_path: Path) -> None:
    folder = write_foreign(published, tmp_path / "model")
    fast = load_json(folder / "tokenizer.json")
    save_json({"model": fast.pop("model"), **fast}, folder / "tokenizer.json")
    stated = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder, "here")(PROBES[0]).input_ids == stated.encode(PROBES[0]).ids


def test_broken_tokenizer_is_refused(published: Path, tmp_path: Path) -> None:
    folder = write_foreign(published, tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}')
    change_json(folder / "tokenizer_config.json", added_tokens_decoder=None)
    with pytest.raises(ConfigError, match=r"^here: .*Copy the tokenizer's files"):
        load_tokenizer(folder, "here")
