"""Limits on the code that a checkpoint brings: a chat template ends in seconds, or is refused by name."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from chat.detect import family_of
from chat.limited import LimitExceeded, run_limited
from chat.template import CHATML_TEMPLATE
from errors import ConfigError

# Each runs for hours or takes gigabytes; all of them after writing a plain conversation correctly.
HOSTILE = {
    "nested loops over ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops over a list": "{% set a = [0] * 9999 %}{% for i in a %}{% for j in a %}{% for k in a %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
    "a constant that the compiler computes": "{{ 'a' * 10**10 }}",
    "a product": "{{ messages[0].role * 10**10 }}",
    "doubling": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "a filter": "{{ messages[0].role | center(10**10) }}",
    "a format": "{{ '%10000000000d' | format(1) }}",
    "a large number": "{{ 9 ** (9 ** 9) }}",
    "a list": "{{ (range(99999) | list * 9999) | length }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "much text": "{{ 'a' * 2000000 }}",
    "no Jinja": "{% for",
    "an error": "{{ 1 // 0 }}",
}  # fmt: skip

_WORDS = json.dumps(
    {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
)


def tokenizer_with(template: str, folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_WORDS), name_or_path=str(folder))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_template_without_end_is_refused(hostile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chat.limited._SECONDS", 1)
    (tmp_path / "chat_template.jinja").write_text(CHATML_TEMPLATE + hostile)
    tokenizer = tokenizer_with(CHATML_TEMPLATE + hostile, tmp_path)
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: the chat template .*\. Restore the official"):
        family_of(tokenizer)


def test_hostile_part_that_does_not_run_is_no_fault(tmp_path: Path) -> None:
    """Negative control for the templates above."""
    template = CHATML_TEMPLATE + "{% if false %}" + HOSTILE["nested loops over ranges"] + "{% endif %}"
    assert family_of(tokenizer_with(template, tmp_path)).name == "chatml"


def test_result_and_errors_come_back() -> None:
    assert run_limited(lambda: {"a": (1, "é")}) == {"a": (1, "é")}
    with pytest.raises(ConfigError, match=r"^no\. yes$"):
        run_limited(lambda: raise_(ConfigError("no", "yes")))
    with pytest.raises(LimitExceeded, match="fails: ZeroDivisionError"):
        run_limited(lambda: 1 // 0)


def test_limits_hold_for_code_that_python_cannot_interrupt() -> None:
    with pytest.raises(LimitExceeded, match="takes more than 1 seconds or 512 MiB"):
        run_limited(lambda: 9 ** (9**9), seconds=1)
    with pytest.raises(LimitExceeded, match="or 64 MiB"):
        run_limited(lambda: len(b"x" * 2**30), memory=2**26)
    before = time.process_time()
    with pytest.raises(LimitExceeded):
        run_limited(lambda: [None for _ in iter(int, 1)], seconds=1)
    assert time.process_time() - before < 1, "the parent only waits"


def raise_(error: Exception) -> None:
    raise error
