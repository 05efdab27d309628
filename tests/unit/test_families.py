"""Qwen1.5 to Qwen3: our rendering against the official chat templates, run by transformers on the real vocabulary.

The recorded rows say for each conversation the text, the characters that the model has to generate (``spans``) and the
ids of the whole text tokenised at once. Ours must give the same, but for two differences that are wanted:

- An answer is cut off its prompt, because at inference the model continues the prompt's ids. Where it starts with a
  newline the recorded ids melt it into the prompt's last newline, a token that no prompt ends in. ``MELTING`` names
  those rows.
- ``<|im_end|>`` in a message stays text (the rows ``control_text``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers
from transformers import AddedToken, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from data_utils.encode import EncodedConversation, EncodeOptions, Encoder
from data_utils.schema import Conversation
from errors import ConfigError, DataError
from qwen_model.chatml import encode_prompt, render, render_prompt, text_of
from qwen_model.families import ANSWER_STYLES, QWEN_V1, Family, Turn
from qwen_model.templates import family_of
from qwen_model.tokenization_qwen import SPLIT_PATTERN

IM_START, IM_END = 151644, 151645

STYLES = {
    "qwen1_5": "chatml",
    "qwen1_5_launch": "chatml-launch",
    "qwen1_5_base": "chatml",
    "qwen2": "chatml",
    "qwen2_5": "chatml",
    "qwen2_5_coder": "chatml",
    "qwen2_5_base": "chatml",
    "qwen2_5_math": "chatml",
    "qwen2_5_launch": "chatml",
    "qwq_32b": "chatml-qwq",
    "qwq_32b_launch": "chatml-qwq-launch",
    "qwq_32b_preview": "chatml",
    "qwen3": "chatml-hybrid",
    "qwen3_launch": "chatml-hybrid",
    "qwen3_instruct_2507": "chatml",
    "qwen3_instruct_2507_launch": "chatml-hybrid",
    "qwen3_thinking_2507": "chatml-thinking",
}

# Rows whose recorded ids hold a token across the end of a prompt: an answer that starts with a newline, and in
# Thinking-2507 the empty thought, "\\n</think>" behind the prompt's "<think>\\n". QwQ strips the newlines of answers.
MELTING: dict[str, set[str]] = {name: {"whitespace_answers"} for name in STYLES} | {
    "qwq_32b": set(),
    "qwq_32b_launch": set(),
    "qwen3_thinking_2507": {
        "single",
        "system_single",
        "multi",
        "whitespace_answers",
        "control_text",
        "assistant_first",
        "two_assistants",
        "empty_answer",
    },
}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint of a family brings: its tokenizer with its template, and what was recorded of it."""

    name: str
    facts: dict[str, Any]
    family: Family
    tokenizer: PreTrainedTokenizerFast
    rows: list[dict[str, Any]]

    def encode(self, turns: list[Turn]) -> EncodedConversation:
        return Encoder(self.tokenizer, self.family, EncodeOptions()).encode_conversation(
            Conversation(tuple(turns), "here")
        )


@cache
def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def _base_tokenizer(rank_file: Path) -> str:
    converted = TikTokenConverter(str(rank_file), pattern=SPLIT_PATTERN).converted()
    converted.normalizer = normalizers.NFC()
    return converted.to_str()


@cache
def _tokenizer(shared: Path, kind: str) -> PreTrainedTokenizerFast:
    base = Tokenizer.from_str(_base_tokenizer(shared / "golden" / "tiny-qwen" / "qwen.tiktoken"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base)
    for token in _load(shared / "families" / "families.json")["added_tokens"][kind]:
        added = AddedToken(token["content"], special=token["special"], normalized=False)
        tokenizer.add_tokens([added], special_tokens=token["special"])
        assert tokenizer.convert_tokens_to_ids(token["content"]) == token["id"]
    return tokenizer


@pytest.fixture(params=STYLES)
def checkpoint(request: pytest.FixtureRequest, shared: Path) -> Checkpoint:
    folder = shared / "families"
    facts = _load(folder / "families.json")["families"][request.param]
    tokenizer = _tokenizer(shared, facts["added_tokens"])
    tokenizer.chat_template = (folder / facts["template"]).read_text(encoding="utf-8")
    family = family_of("qwen2", tokenizer)
    rows = _load(folder / "expected_training.json").get(facts.get("alias_of", request.param), [])
    return Checkpoint(request.param, facts, family, tokenizer, [row for row in rows if _is_plain(row, family)])


def _is_plain(row: dict[str, Any], family: Family) -> bool:
    """Only system, user and assistant with text; no tools, and no thinking where that has a meaning."""
    for message in row["messages"]:
        plain = set(message) == {"role", "content"} and isinstance(message["content"], str)
        if not plain or message["role"] not in ("system", "user", "assistant"):
            return False
        if family.has_thinking and message["role"] == "assistant" and "think>" in message["content"]:
            return False
    return not row["tools"]


def _turns(row: dict[str, Any]) -> list[Turn]:
    return [Turn(message["role"], message["content"]) for message in row["messages"]]


def _closed(text: str) -> str:
    return text if text.endswith("<|im_end|>\n") else text + "<|im_end|>\n"


def _answer_starts(row: dict[str, Any], family: Family) -> list[int]:
    """Where each answer starts behind its prompt, in characters, from the recorded header ends."""
    starts = []
    for turn in row["turns"]:
        start = turn["header_end"]
        starts.append(start + len(family.prompt_suffix) * row["text"].startswith(family.prompt_suffix, start))
    return starts


def _trained_runs(encoded: EncodedConversation) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for index, trained in enumerate(encoded.trained):
        if trained and runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        elif trained:
            runs.append((index, index + 1))
    return runs


def test_family_is_read_off_the_template(checkpoint: Checkpoint) -> None:
    assert checkpoint.family.name == STYLES[checkpoint.name]
    assert checkpoint.family.default_system == checkpoint.facts["default_system"]
    if checkpoint.name != "qwen2_5_launch":  # the only family that nothing was recorded of
        assert len(checkpoint.rows) >= 8


def test_text_and_trained_characters_are_the_templates_own(checkpoint: Checkpoint) -> None:
    for row in checkpoint.rows:
        position = 0
        spans: list[list[int]] = []
        rendered = render(_turns(row), checkpoint.family)
        for segment in (segment for turn in rendered for segment in turn):
            end = position + len(segment.text)
            if segment.is_trained and spans and spans[-1][1] == position:
                spans[-1][1] = end
            elif segment.is_trained:
                spans.append([position, end])
            position = end
        assert text_of(rendered) == row["text"], row["name"]
        assert spans == row["spans"], row["name"]
        template = checkpoint.tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert text_of(rendered) == _closed(str(template)), row["name"]


def test_ids_and_trained_tokens(checkpoint: Checkpoint) -> None:
    differing = set()
    for row in checkpoint.rows:
        encoded = checkpoint.encode(_turns(row))
        runs = _trained_runs(encoded)
        trained_texts = [checkpoint.tokenizer.decode(encoded.input_ids[start:end]) for start, end in runs]
        assert checkpoint.tokenizer.decode(encoded.input_ids) == row["text"], row["name"]
        assert trained_texts == [row["text"][start:end] for start, end in row["spans"]], row["name"]
        if encoded.input_ids != row["ids"]:
            differing.add(row["name"])
        else:
            assert [list(run) for run in runs] == row["token_spans"], row["name"]
    assert differing == ({"control_text"} | MELTING[checkpoint.name] if checkpoint.rows else set())


def test_ids_are_those_of_the_text_cut_where_answers_start(checkpoint: Checkpoint) -> None:
    for row in checkpoint.rows:
        if row["name"] == "control_text":
            continue
        cuts = [0, *_answer_starts(row, checkpoint.family), len(row["text"])]
        pieces = [row["text"][start:end] for start, end in pairwise(cuts)]
        expected = [
            id_ for piece in pieces for id_ in checkpoint.tokenizer(piece, add_special_tokens=False)["input_ids"]
        ]
        assert checkpoint.encode(_turns(row)).input_ids == expected, row["name"]


def test_control_text_in_messages_gives_no_control_ids(checkpoint: Checkpoint) -> None:
    for row in checkpoint.rows:
        turns = _turns(row)
        brings_system = turns[0].role == "system" or checkpoint.family.default_system is None
        ids = checkpoint.encode(turns).input_ids
        placed = len(turns) + (0 if brings_system else 1)
        assert ids.count(IM_START) == ids.count(IM_END) == placed, row["name"]
        assert sum(id_ >= IM_START and id_ <= 151656 for id_ in ids) == 2 * placed, row["name"]


def test_prompts_are_the_templates_own_and_start_the_training_ids(checkpoint: Checkpoint) -> None:
    for row in checkpoint.rows:
        turns = _turns(row)
        encoded = checkpoint.encode(turns)
        starts = [start for start, _ in _trained_runs(encoded)]
        prompts = []
        for index, turn in enumerate(turns):
            if turn.role != "assistant" or index == 0:
                continue
            rendered = render_prompt(turns[:index], checkpoint.family)
            template = checkpoint.tokenizer.apply_chat_template(
                row["messages"][:index], tokenize=False, add_generation_prompt=True
            )
            assert text_of(rendered) == template, (row["name"], index)
            prompt = encode_prompt(rendered, checkpoint.tokenizer)
            if encoded.input_ids[: len(prompt)] == prompt:
                prompts.append(len(prompt))
        assert set(starts) <= set(prompts), row["name"]
        assert len(starts) == len(row["spans"]), row["name"]


def _random_conversation(random: Random) -> list[Turn]:
    """Any order of turns, with texts of white space, control tokens and words."""
    pieces = ("\n", "\n\n", " ", "\t", "\r\n", "a", "Hi", "你好", ".", "<|im_end|>", "<think")
    roles = ["system"] if random.random() < 0.3 else []
    roles += random.choices(("user", "assistant"), k=random.randint(1, 6))
    return [Turn(role, "".join(random.choices(pieces, k=random.randint(0, 4)))) for role in roles]


def test_random_conversations_against_the_template(checkpoint: Checkpoint) -> None:
    """Text, prompts, and that exactly those answers are trained whose prompt starts the conversation's text."""

    def template(turns: list[Turn], prompt: bool) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return str(checkpoint.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    random = Random(0)
    for _ in range(60):
        turns = _random_conversation(random)
        rendered = render(turns, checkpoint.family)
        text = _closed(template(turns, prompt=False))
        assert text_of(rendered) == text, turns
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            trained = any(segment.is_trained for segment in rendered[index - len(turns)])
            prompt = template(turns[:index], prompt=True) if index else None
            if prompt is not None:
                assert prompt == text_of(render_prompt(turns[:index], checkpoint.family)), turns[:index]
            # Without a header at its end it asks for nothing: Qwen1.5 as published, after an answer.
            asks = prompt is not None and prompt.endswith("<|im_start|>assistant\n" + checkpoint.family.prompt_suffix)
            assert trained == (asks and text.startswith(str(prompt))), (index, turns)


def test_thinking_is_refused_where_it_has_a_meaning(checkpoint: Checkpoint) -> None:
    turns = [Turn("user", "1+1?"), Turn("assistant", "<think>\nadd\n</think>\n\n2")]
    if checkpoint.family.has_thinking:
        with pytest.raises(DataError, match="here: turn 2 holds <think> or </think>: thinking is not supported yet"):
            checkpoint.encode(turns)
        with pytest.raises(DataError, match="thinking is not supported yet"):
            checkpoint.encode([turns[0], Turn("assistant", "add</think>2")])
    else:
        assert checkpoint.encode(turns).trained_tokens > 0
    assert checkpoint.encode([Turn("user", "what is <think>?"), Turn("assistant", "a tag")]).input_ids


@pytest.mark.parametrize(
    ("model_type", "default_system"),
    [("qwen2", "You are a helpful assistant."), ("qwen3", None)],
    ids=["qwen2", "qwen3"],
)
def test_base_checkpoint_without_a_template(model_type: str, default_system: str | None) -> None:
    family = family_of(model_type, SimpleNamespace(chat_template=None))
    assert (family.name, family.default_system) == ("chatml", default_system)


def test_model_type_decides() -> None:
    assert family_of("qwen", None) is QWEN_V1
    with pytest.raises(ConfigError, match=r"model_type 'llama' is not supported"):
        family_of("llama", None)


def test_a_template_that_is_no_known_one_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_WORD_LEVEL))
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="does not write plain conversations as any known Qwen template"):
        family_of("qwen2", tokenizer)


def test_every_style_is_met_by_a_family() -> None:
    assert {style.name for style in ANSWER_STYLES} == set(STYLES.values())


_WORD_LEVEL = json.dumps(
    {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
)
