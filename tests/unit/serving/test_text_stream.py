"""The text of an answer comes in whole characters, and ends before a stop text, however tokens divide both."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loading.tokenizer import load_tokenizer
from serving.text_stream import TextStream, TokenBytes
from tests.models import TINY, write_later_checkpoint

TEXTS = (
    "Hello, world",
    "你好，世界！学而时习之",
    "🏳️‍🌈👩‍🚀 caf\u00e9",
    "\ufffd is a character, too",
    "a<tool_call>\n{}</tool_call>",
)


@pytest.fixture(scope="module", params=["qwen", "qwen2"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = TINY
    if request.param == "qwen2":
        folder = write_later_checkpoint(tmp_path_factory.mktemp("stream") / "qwen2", "qwen2")
    return load_tokenizer(folder, "here")


def pieces(stream: TextStream, ids: list[int]) -> Iterator[str]:
    for id_ in ids:
        yield stream.feed(id_)
    yield stream.close()


@pytest.mark.parametrize("text", TEXTS)
def test_characters_are_whole(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    got = list(pieces(TextStream(TokenBytes(tokenizer)), ids))
    assert "".join(got) == text
    assert sum("\ufffd" in piece for piece in got) == text.count("\ufffd")


def test_any_ids_have_the_text_of_the_tokenizer(tokenizer: Any) -> None:
    draw = random.Random(0)
    token_bytes = TokenBytes(tokenizer)
    for _ in range(50):
        ids = [draw.randrange(len(tokenizer)) for _ in range(30)]
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(pieces(TextStream(token_bytes), ids)) == expected


def test_incomplete_character_is_shown_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("👩", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    assert list(pieces(TextStream(TokenBytes(tokenizer)), ids[:1])) == ["", "\ufffd"]


class _Characters:
    """Token bytes of a vocabulary whose ids are bytes."""

    def of_answer(self, id_: int) -> bytes:
        return bytes([id_])


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one END two", ("END",), "one "),
        ("one EN two", ("END",), "one EN two"),
        ("aab", ("ab",), "a"),
        ("ababc", ("abc",), "ab"),
        ("x 好 y", ("好",), "x "),
        ("abcd", ("bcd", "c"), "ab"),  # the one that is complete first
        ("ends with a beginning EN", ("END",), "ends with a beginning EN"),
        ("stop at once", ("stop",), ""),
    ],
)
def test_stop_text_ends_the_answer(text: str, stops: tuple[str, ...], expected: str) -> None:
    stream: Any = TextStream(_Characters(), stops)  # type: ignore[arg-type]
    got = ""
    for byte in text.encode():
        got += stream.feed(byte)
        assert expected.startswith(got)
    is_stopped = stream.is_stopped
    assert got + stream.close() == expected
    assert is_stopped == (expected != text)


def test_text_without_stops_is_not_held_back() -> None:
    stream: Any = TextStream(_Characters(), ("\nObservation:",))  # type: ignore[arg-type]
    assert [stream.feed(byte) for byte in b"ab\nOc"] == ["a", "b", "", "", "\nOc"]
