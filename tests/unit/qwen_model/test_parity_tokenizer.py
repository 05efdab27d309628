"""The tokenizer against the original's: ids, decoding, special tokens, padding, saving."""

from __future__ import annotations

import ast
import base64
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qwen_model.register import register_qwen
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.golden import Golden

IM_START = "<|im_start|>"


@pytest.fixture(scope="module")
def recorded(any_golden: Golden) -> dict[str, Any]:
    return any_golden.load_json("tokenizer.json")


@pytest.fixture
def tokenizer(any_golden: Golden) -> QWenTokenizer:
    """A new tokenizer, which the test may change."""
    return QWenTokenizer.from_pretrained(any_golden.tiny)


def ids_of(tokenizer: QWenTokenizer, text: str, **kwargs: Any) -> list[int]:
    return tokenizer(text, **kwargs)["input_ids"]


def test_ids_with_special_tokens_allowed(tiny_tokenizer: QWenTokenizer, recorded: dict[str, Any]) -> None:
    """The default of the original, but not of ours."""
    for case in recorded["strings"]:
        assert ids_of(tiny_tokenizer, case["text"], allowed_special="all") == case["ids"], case["text"]
        assert tiny_tokenizer.encode(case["text"], allowed_special="all") == case["ids"], case["text"]


def test_special_tokens_in_text_are_plain_by_default(tiny_tokenizer: QWenTokenizer, recorded: dict[str, Any]) -> None:
    first_control = len(tiny_tokenizer.mergeable_ranks)
    for case in recorded["strings"]:
        assert ids_of(tiny_tokenizer, case["text"]) == case["ids_plain"], case["text"]
        assert tiny_tokenizer.encode(case["text"]) == case["ids_plain"], case["text"]
        assert tiny_tokenizer.encode_plain(case["text"]) == case["ids_plain"], case["text"]
        explicit = ids_of(tiny_tokenizer, case["text"], allowed_special=set(), disallowed_special=())
        assert explicit == case["ids_plain"], case["text"]
        assert all(id_ < first_control for id_ in explicit), case["text"]


def test_some_special_tokens_allowed(tiny_tokenizer: QWenTokenizer, recorded: dict[str, Any]) -> None:
    cases = [case for case in recorded["strings"] if "ids_only_im_start" in case]
    assert any(IM_START in case["text"] for case in cases)
    for case in cases:
        ids = ids_of(tiny_tokenizer, case["text"], allowed_special={IM_START}, disallowed_special=())
        assert ids == case["ids_only_im_start"], case["text"]


def test_special_tokens_disallowed(tiny_tokenizer: QWenTokenizer, recorded: dict[str, Any]) -> None:
    cases = [case for case in recorded["strings"] if "disallowed_all" in case]
    assert any(isinstance(case["disallowed_all"], dict) for case in cases)
    for case in cases:
        if isinstance(case["disallowed_all"], dict):
            with pytest.raises(ValueError, match="disallowed special token"):
                ids_of(tiny_tokenizer, case["text"], allowed_special=set(), disallowed_special="all")
        else:
            ids = ids_of(tiny_tokenizer, case["text"], allowed_special=set(), disallowed_special="all")
            assert ids == case["disallowed_all"], case["text"]


def test_decoding_of_every_string(tiny_tokenizer: QWenTokenizer, recorded: dict[str, Any]) -> None:
    for case in recorded["strings"]:
        assert tiny_tokenizer.decode(case["ids"]) == case["decoded"], case["text"]
        without = tiny_tokenizer.decode(case["ids"], skip_special_tokens=True)
        assert without == case["decoded_skip_special"], case["text"]
        assert tiny_tokenizer.decode(case["ids_plain"]) == case["decoded_plain"], case["text"]
    texts = tiny_tokenizer.batch_decode([case["ids"] for case in recorded["strings"]])
    assert texts == [case["decoded"] for case in recorded["strings"]]


def test_tokens_of_every_string(tiny_tokenizer: QWenTokenizer, recorded: dict[str, Any]) -> None:
    for case in recorded["strings"]:
        tokens = [token[2:] if token.startswith("S:") else base64.b64decode(token) for token in case["tokens_b64"]]
        assert tiny_tokenizer.convert_ids_to_tokens(case["ids"]) == tokens, case["text"]
        assert tiny_tokenizer.convert_tokens_to_ids(tokens) == case["ids"], case["text"]


def test_decode_cases(tiny_tokenizer: QWenTokenizer, recorded: dict[str, Any]) -> None:
    """Incomplete characters, single ids, control tokens; ids without a token raise."""
    for case in recorded["decode"]:
        if isinstance(case["out"], str):
            assert tiny_tokenizer.decode(case["ids"], **case["kwargs"]) == case["out"], case
        else:
            with pytest.raises(ValueError):
                tiny_tokenizer.decode(case["ids"], **case["kwargs"])


def test_attributes(tiny_tokenizer: QWenTokenizer, recorded: dict[str, Any]) -> None:
    expected = recorded["attributes"]
    assert tiny_tokenizer.eod_id == expected["special_tokens"]["<|endoftext|>"]
    for name in ("eod_id", "im_start_id", "im_end_id", "vocab_size", "errors", "special_tokens"):
        assert getattr(tiny_tokenizer, name) == expected[name], name
    assert len(tiny_tokenizer) == expected["len"]
    assert len(tiny_tokenizer.mergeable_ranks) == expected["n_mergeable_ranks"]
    assert len(tiny_tokenizer.get_vocab()) == expected["get_vocab_len"], "without the special tokens"
    assert tiny_tokenizer.model_max_length == expected["before_pad_set"]["model_max_length"]
    for name in ("padding_side", "truncation_side"):
        assert getattr(tiny_tokenizer, name) == expected["before_pad_set"][name], name
    # Intended difference: the original set neither, so that padding failed; Qwen v1 has no token types.
    assert tiny_tokenizer.pad_token == tiny_tokenizer.eos_token == "<|endoftext|>"
    assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id == expected["eod_id"]
    assert tiny_tokenizer.bos_token is None
    assert tiny_tokenizer.model_input_names == ["input_ids", "attention_mask"]


CALL = re.compile(r"(?:padding_side=(?P<side>left|right) )?tok\((?P<arguments>.*)\)")
"""How a call of the tokenizer is recorded, as in ``padding_side=left tok(['a','b'],padding=True)``."""


def test_recorded_calls_of_the_tokenizer(tokenizer: QWenTokenizer, recorded: dict[str, Any]) -> None:
    """Intended difference: no token_type_ids, which the model never used."""
    compared = 0
    for key, expected in recorded["calls"].items():
        match = CALL.fullmatch(key)
        if match is None:
            continue
        call = ast.parse(f"f({match['arguments']})", mode="eval").body
        assert isinstance(call, ast.Call)
        arguments = [ast.literal_eval(argument) for argument in call.args]
        keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        tokenizer.padding_side = match["side"] or "right"
        if "error" in expected:
            with pytest.raises((ValueError, TypeError)):
                tokenizer(*arguments, **keywords)
            continue
        if isinstance(arguments[0], list):  # the key shortens the texts of a batch
            rows = zip(expected["input_ids"], expected["attention_mask"], strict=True)
            arguments[0] = [tokenizer.decode([id_ for id_, real in zip(*row, strict=True) if real]) for row in rows]
        assert dict(tokenizer(*arguments, **keywords)) == {
            name: expected[name] for name in ("input_ids", "attention_mask")
        }, key
        compared += 1
    assert compared


def test_conversions(tiny_tokenizer: QWenTokenizer, recorded: dict[str, Any]) -> None:
    ids = tiny_tokenizer.convert_tokens_to_ids
    assert ids("<|im_end|>") == tiny_tokenizer.im_end_id
    word = tiny_tokenizer.convert_ids_to_tokens(tiny_tokenizer.encode("user")[0])
    assert word == b"user"
    known = ids(word)
    assert known == tiny_tokenizer.encode("user")[0]
    # Ordinary tokens are bytes: a string or unknown bytes convert to None.
    assert ids("user") is None
    assert ids([word, "<|endoftext|>", b"zzzzqq"]) == [known, tiny_tokenizer.eod_id, None]
    with pytest.raises(ValueError):
        tiny_tokenizer.convert_ids_to_tokens(len(tiny_tokenizer))
    tokens = ["你".encode(), "<|im_end|>", b"ok", b"\xe4"]
    assert tiny_tokenizer.convert_tokens_to_string(tokens) == recorded["calls"]["convert_tokens_to_string"]


def test_new_tokens_are_refused(tokenizer: QWenTokenizer, recorded: dict[str, Any]) -> None:
    """The ids after the ranks are fixed; ``<|extra_0|>`` and the following are available to users."""
    assert recorded["calls"]["add_tokens"]["error"] == "ValueError"
    with pytest.raises(ValueError):
        tokenizer.add_tokens(["new"])
    with pytest.raises(ValueError):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    for wrong in (None, 5):
        with pytest.raises((ValueError, TypeError)):
            tokenizer(wrong)


def test_pickling(tiny_tokenizer: QWenTokenizer, recorded: dict[str, Any]) -> None:
    """Data loaders pickle tokenizers for their workers."""
    copy = pickle.loads(pickle.dumps(tiny_tokenizer))
    for case in recorded["strings"]:
        assert copy.encode(case["text"]) == case["ids_plain"], case["text"]


def test_saving_and_loading(
    tiny_tokenizer: QWenTokenizer, any_golden: Golden, recorded: dict[str, Any], tmp_path: Path
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "qwen.tiktoken").read_bytes() == (any_golden.tiny / "qwen.tiktoken").read_bytes()
    assert (tmp_path / "tokenizer_config.json").is_file()
    assert not list(tmp_path.glob("*.py")), "no code is saved"
    register_qwen()
    for reloaded in (QWenTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert type(reloaded) is QWenTokenizer
        assert reloaded.special_tokens == tiny_tokenizer.special_tokens
        assert reloaded.pad_token_id == reloaded.eos_token_id == tiny_tokenizer.eod_id
        assert reloaded.model_max_length == tiny_tokenizer.model_max_length
        for case in recorded["strings"]:
            assert ids_of(reloaded, case["text"]) == case["ids_plain"], case["text"]
            assert ids_of(reloaded, case["text"], allowed_special="all") == case["ids"], case["text"]


def test_extra_vocabulary(golden_large: Path, tmp_path: Path) -> None:
    golden = Golden("large", golden_large)
    recorded = golden.load_json("tokenizer.json")["extra_vocab"]
    extra = tmp_path / "qwen_extra.tiktoken"
    extra.write_text(recorded["content"], encoding="utf-8")
    tokenizer = QWenTokenizer.from_pretrained(golden.tiny, extra_vocab_file=str(extra))
    saved = tmp_path / "saved"
    tokenizer.save_pretrained(saved)
    extra.unlink()
    for loaded in (tokenizer, QWenTokenizer.from_pretrained(saved)):
        assert len(loaded) == recorded["len"]
        for case in recorded["cases"]:
            assert ids_of(loaded, case["text"], allowed_special="all") == case["ids"], case["text"]
            assert loaded.decode(case["ids"]) == case["decoded"], case["text"]
    plain = QWenTokenizer.from_pretrained(golden.tiny)
    for case in recorded["cases"]:
        assert ids_of(plain, case["text"], allowed_special="all") == case["ids_without_extra"], case["text"]


def write_extra(path: Path, tokens: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in tokens.items()))
    return path


def test_extra_vocabulary_follows_the_special_tokens(golden_small: Path, tmp_path: Path) -> None:
    folder = golden_small / "tiny-qwen-small"
    extra = write_extra(tmp_path / "extra.tiktoken", {"斑马".encode(): 908, b" zebra": 909})
    tokenizer = QWenTokenizer.from_pretrained(folder, extra_vocab_file=str(extra))
    assert len(tokenizer) == 910
    plain = QWenTokenizer.from_pretrained(folder)
    assert tokenizer.encode("a zebra") == [*plain.encode("a"), 909]
    assert tokenizer.decode([909, 908]) == " zebra斑马"
    assert tokenizer.decode([909], skip_special_tokens=True) == " zebra", "an ordinary word, not a control token"
    assert tokenizer.special_tokens == plain.special_tokens


@pytest.mark.parametrize(
    ("content", "line"),
    [("YQ== 908\nnot base64! 909\n", 2), ("YQ==\n", 1), ("enp6eg== 908\nenp6eg== 909\n", 2), ("a== b 908\n", 1)],
    ids=["broken base64", "no rank", "a token twice", "three fields"],
)
def test_error_in_rank_file_names_the_line(golden_small: Path, tmp_path: Path, content: str, line: int) -> None:
    extra = tmp_path / "extra.tiktoken"
    extra.write_text(content)
    with pytest.raises(ValueError, match=rf"extra\.tiktoken:{line}\b"):
        QWenTokenizer.from_pretrained(golden_small / "tiny-qwen-small", extra_vocab_file=str(extra))


def test_extra_ranks_already_used_are_refused(golden_small: Path, tmp_path: Path) -> None:
    folder = golden_small / "tiny-qwen-small"
    for tokens, message in [({b" zebra": 5}, "908"), ({b" zebra": 909}, "908"), ({b"user": 908}, "user")]:
        extra = write_extra(tmp_path / "extra.tiktoken", tokens)
        with pytest.raises(ValueError, match=rf"extra\.tiktoken: .*{message}"):
            QWenTokenizer.from_pretrained(folder, extra_vocab_file=str(extra))


def test_missing_rank_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    with pytest.raises(ValueError, match=r"qwen\.tiktoken"):
        QWenTokenizer.from_pretrained(tmp_path)
