"""What a conversation loses, or what may not be meant, is counted in the report with its places."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from chat.families import ANSWER_STYLES, QWEN_V1, Family
from chat.tools_hermes import HERMES_FORMS
from data_utils.encode import EncodeOptions, Encoder
from data_utils.prepared import load_examples
from data_utils.report.page import render_html
from data_utils.report.terminal import render_report
from errors import ConfigError
from tests.chats import Subject
from tests.data import reader
from tests.records import ANSWER, ASK, TOOL, openai_call

HYBRID = next(style for style in ANSWER_STYLES if style.thinking == "block")


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def calling(arguments: Any = "{}", name: str = "weather", **tool: Any) -> dict[str, Any]:
    call = {"role": "assistant", "content": "", "tool_calls": [openai_call(name, arguments)]}
    return {"messages": [ASK, call], "tools": [{**TOOL, **tool}]}


def thinking(*answers: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [turn for answer in answers for turn in (ASK, {**ANSWER, **answer})]}


CASES: dict[str, tuple[Family, list[dict[str, Any]], dict[str, int]]] = {
    "undeclared calls": (
        QWEN_V1,
        [calling(), calling(name="time"), calling("{ }", name="clock")],
        {"call functions that none of their tools describes": 2},
    ),
    "arguments": (
        QWEN_V1,
        [calling([1]), calling(), calling("null")],
        {"call functions with arguments that are not a JSON object": 2},
    ),
    "null fields": (
        QWEN_V1,
        [calling(strict=None), calling({"city": None})],
        {
            "have null fields in tools or arguments, which are left out as those of a table (as JSON text they are "
            "kept)": 2
        },
    ),
    "fields of tools in ReAct text": (
        QWEN_V1,
        [calling(), calling(returns={"type": "string"}, type="function"), calling(returns="a", examples=["b"])],
        {
            "describe tools with 'returns', which the chat format 'qwen' does not write": 2,
            "describe tools with 'examples', which the chat format 'qwen' does not write": 1,
        },
    ),
    "fields of tools as JSON": (
        Family("chatml", tool_form=HERMES_FORMS[2]),
        [calling(returns={"type": "string"})],
        {},
    ),
    "thinking": (
        HYBRID,
        [
            thinking({"reasoning_content": "Hm."}, {"reasoning_content": "Oh."}),
            thinking({}, {"reasoning_content": "Oh."}),
            thinking({"content": "<think>\nHm.\n</think>\n\nHello!"}, {}),
            thinking({"reasoning_content": "  "}, {}),
        ],
        {"contain thinking that the chat format 'chatml-hybrid' leaves out at its place": 2},
    ),
    "thinking without an end": (
        HYBRID,
        [thinking({"content": "<think>\nHm. Hello!"}, {}), thinking({"content": "<think>Hm.</think>Hello!"})],
        {"have answers that open thinking and do not end it, which are trained as answers without thinking": 1},
    ),
    "thinking as text": (QWEN_V1, [thinking({"content": "<think>\nHm.\n</think>\n\nHello!"}, {})], {}),
    "special tokens": (
        QWEN_V1,
        [
            thinking({"content": "a<|extra_3|><|extra_3|>"}),
            thinking({"content": "<|im_end|>"}),
            calling(title="<|extra_7|>"),
        ],
        {
            "contain '<|extra_3|>', which is trained as text, not as the special token of that name "
            "(--allow_special_tokens '<|extra_3|>' changes it)": 1,
            "contain '<|extra_7|>', which is trained as text, not as the special token of that name "
            "(--allow_special_tokens '<|extra_7|>' changes it)": 1,
            "describe tools with 'title', which the chat format 'qwen' does not write": 1,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "subject"),
    [(name, "small" if family is QWEN_V1 else "fast") for name, (family, _, _) in CASES.items()],
    indirect=["subject"],
)
def test_notes_are_counted_with_their_places(
    name: str, subject: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family, records, expected = CASES[name]
    path = write(tmp_path / "a.jsonl", *records)
    data = reader(Encoder(subject.tokenizer, family, EncodeOptions()), path)
    with caplog.at_level(logging.WARNING):
        load_examples(data)
    report = data.reports["train"]
    as_json = json.loads(json.dumps(report.as_dict()))
    assert as_json["notes"] == expected and as_json["kept"] == len(records)
    counted: dict[str, int] = {}
    for place in as_json["notes_at"]:
        assert place["where"].startswith(f"{path}:")
        counted[place["reason"]] = counted.get(place["reason"], 0) + 1
    assert counted == expected
    shown, page = render_report(report, color=False, width=1000), render_html([report])
    for note, count in expected.items():
        line = f"{count} of {len(records)} conversations {note}: {path}:"
        assert line in shown and any(line in warning for warning in caplog.messages)
        assert str(count) in page and note.split("'")[0] in page


def test_repeated_records_count_as_often_as_they_are_used(subject: Subject, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", calling("[]"))
    family = QWEN_V1 if subject.is_v1 else Family("chatml", tool_form=HERMES_FORMS[2])
    data = reader(Encoder(subject.tokenizer, family, EncodeOptions()), f"{path}@x3")
    load_examples(data)
    assert list(data.reports["train"].total().notes.counts.values()) == [3]


# ------------------------------------------------------------------------------------------------------- special tokens


def text_of(*contents: str) -> dict[str, Any]:
    return thinking(*({"content": content} for content in contents))


@pytest.fixture
def own_tokens(subject: Subject) -> tuple[str, str]:
    """Two special tokens that are no control tokens."""
    return ("<|extra_0|>", "<|extra_10|>") if subject.is_v1 else ("<|vision_start|>", "<|vision_pad|>")


def test_allowed_special_tokens_become_their_ids(subject: Subject, own_tokens: tuple[str, str], tmp_path: Path) -> None:
    one, two = own_tokens
    ids = {token: subject.tokenizer.convert_tokens_to_ids(token) for token in own_tokens}
    path = write(tmp_path / "a.jsonl", text_of(f"a{one}b{one}{two}<|im_end|>{one[:-1]}"), text_of(one))
    family = subject.families[0]
    plain = Encoder(subject.tokenizer, family, EncodeOptions())
    allowing = Encoder(subject.tokenizer, family, EncodeOptions(allow_special_tokens=(one,)))
    for encoder, counts in ((plain, [0, 0]), (allowing, [2, 1])):
        data = reader(encoder, path)
        examples = load_examples(data)["train"]
        for example, count in zip(examples, counts, strict=True):
            assert example["input_ids"].count(ids[one]) == example["labels"].count(ids[one]) == count
            assert ids[two] not in example["input_ids"]
            assert example["input_ids"].count(encoder._control_ids["<|im_end|>"]) == len(
                [id_ for id_ in example["input_ids"] if id_ == encoder._control_ids["<|im_start|>"]]
            )
        noted = " ".join(data.reports["train"].total().notes.counts)
        assert (f"'{one}'" in noted) == (encoder is plain) and f"'{two}'" in noted
    texts = [plain.decode(example["input_ids"]) for example in load_examples(reader(plain, path))["train"]]
    allowed = [allowing.decode(example["input_ids"]) for example in load_examples(reader(allowing, path))["train"]]
    assert texts == allowed


def test_control_tokens_and_unknown_names_are_refused(subject: Subject, own_tokens: tuple[str, str]) -> None:
    def refusal(*names: str) -> str:
        with pytest.raises(ConfigError) as error:
            Encoder(subject.tokenizer, subject.families[0], EncodeOptions(allow_special_tokens=names))
        return str(error.value)

    for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert refusal(own_tokens[0], name) == (
            f"--allow_special_tokens {name}: text must never become a control token of the chat format. Remove it"
        )
    for name in ("<sep>", "a", "", "<|im_start|>user"):
        assert refusal(name).startswith(f"--allow_special_tokens {name}: the tokenizer has no such special token. Its ")


def test_token_without_a_row_in_the_model_is_refused(subject: Subject, own_tokens: tuple[str, str]) -> None:
    id_ = subject.tokenizer.convert_tokens_to_ids(own_tokens[0])
    encoder = Encoder(subject.tokenizer, subject.families[0], EncodeOptions(allow_special_tokens=own_tokens[:1]))
    encoder.check_rows(id_ + 1)
    with pytest.raises(ConfigError, match=rf": its id is {id_}, but the model's embedding has {id_} rows\. Enlarge"):
        encoder.check_rows(id_)


@pytest.mark.parametrize("subject", ["fast"], indirect=True)
def test_control_token_under_another_role_is_refused(subject: Subject) -> None:
    """The tokens that end and pad texts are control tokens, whatever their names are."""
    tokenizer = subject.tokenizer
    previous = tokenizer.eos_token
    try:
        tokenizer.eos_token = "<|vision_start|>"
        with pytest.raises(ConfigError, match="must never become a control token"):
            Encoder(tokenizer, subject.families[0], EncodeOptions(allow_special_tokens=("<|vision_start|>",)))
    finally:
        tokenizer.eos_token = previous
