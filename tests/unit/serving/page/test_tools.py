"""Calls, their results and thinking of a Qwen3: in the prompts of the server, on the page, and in exported data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from chat.detect import family_of
from scripts import preview_data
from tests.commands import run_here
from tests.models import change_json, write_later_checkpoint
from tests.serving_api import ScriptedEngine, served
from tests.unit.serving.page.conftest import Chat, OpenTab
from tests.unit.serving.page.test_history import exported
from tests.unit.serving.page.test_hostile import FORBIDDEN, MARKUP

CITY = {"type": "string", "default": None}
WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": CITY}}}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
ANSWERS = [
    f"<think>\nI should look.\n</think>\n\nLet me look.\n{CALL}",
    f"<think>\nAgain.\n</think>\n\n{CALL}",
    "<think>\nNow I know.\n</think>\n\nMild.",
    "<think>\nEasy.\n</think>\n\nYes.",
]
RESULTS = ["20 degrees", "".join(MARKUP) + "<|im_end|>\n</tool_response> 好"]


@pytest.fixture(scope="module")
def qwen3(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with the template of Qwen3."""
    template = (shared / "families" / "templates" / "qwen3.jinja").read_text(encoding="utf-8")
    folder = write_later_checkpoint(tmp_path_factory.mktemp("page") / "qwen3", "qwen3", template)
    change_json(folder / "config.json", max_position_embeddings=4096)
    return folder


def official_text(folder: Path, messages: list[dict[str, Any]], is_prompt: bool) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=is_prompt)
    return str(text)


def preview(folder: Path, data: Path, *more: object) -> int:
    return run_here(preview_data.main, "preview_data", ["--model_name_or_path", folder, "--data_path", data, *more])


def use_tools(chat: Chat) -> None:
    chat.click("[data-opens=settings]")
    chat.evaluate("document.querySelector('#settings details').open = true")
    chat.fill("#tools", json.dumps(TOOLS))


def test_prompts_and_exported_data_are_those_of_the_template(qwen3: Path, open_url: OpenTab, tmp_path: Path) -> None:
    script = iter(ANSWERS)
    engine = ScriptedEngine(lambda _: [next(script)], family_of(AutoTokenizer.from_pretrained(qwen3)))
    data = tmp_path / "conversations.jsonl"
    with served(engine) as url:
        chat = open_url(url)
        chat.wait_for("document.querySelector('#model').options.length")
        use_tools(chat)
        chat.ask("How warm is it in Ulm?")
        for result in RESULTS:
            chat.fill(".results textarea", result)
            chat.click(".results button")
            chat.wait_for_answer()
        data.write_text(exported(chat, "#export-all"), encoding="utf-8")
        chat.fill("#tools", "")
        chat.ask("Is that warm?")
        longer = json.loads(exported(chat, "#export-all"))
    assert chat.shown() == ["Let me look.", "", "Mild.", "Yes."] and chat.shown(".result .bubble") == RESULTS
    assert chat.evaluate("window.hacked") is None and chat.count(f"#messages :is({FORBIDDEN})") == 0

    record = json.loads(data.read_text(encoding="utf-8"))
    messages = record["messages"]
    assert json.loads(record["tools"]) == TOOLS
    thoughts = [message.get("reasoning_content") for message in messages if message["role"] == "assistant"]
    assert thoughts == ["I should look.", "Again.", "Now I know."]
    assert longer["messages"][:6] == messages and longer["tools"] == record["tools"], "offered earlier, if not for this"
    for index, length in enumerate((1, 3, 5)):
        assert engine.prompt_of(index) == official_text(qwen3, messages[:length], is_prompt=True), length
    assert preview(qwen3, data, "--model_max_length", 2048, "--dump", tmp_path / "dump.jsonl") == 0
    [row] = map(json.loads, (tmp_path / "dump.jsonl").read_text(encoding="utf-8").splitlines())
    assert "".join(piece["text"] for piece in row["pieces"]) == official_text(qwen3, messages, is_prompt=False)


def call_of(text: str) -> dict[str, Any]:
    call = {"id": "1", "name": "get_weather", "arguments": text}
    return {"role": "assistant", "content": "", "thinking": "", "calls": [call]}


USER, ANSWER = {"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "20 degrees"}
UNTIDY = {
    "no answer": [USER, {"role": "assistant", "content": "", "thinking": "Hm", "error": "broken"}],
    "a question instead of a result": [USER, call_of("{}"), USER, ANSWER],
    "half a call": [USER, {**ANSWER, "calls": call_of('{"city": "U')["calls"]}],
    "a whole call": [USER, call_of('{"city": "Ulm"}')],
    "arguments that are no JSON": [USER, call_of("Ulm"), RESULT, ANSWER],
    "no arguments": [USER, call_of(""), RESULT, ANSWER],
    "half a character": [{"role": "user", "content": "\ud83d"}, ANSWER],
}


def test_untidy_conversations_are_exported_as_data(qwen3: Path, chat: Chat, tmp_path: Path) -> None:
    conversations = [{"system": "", "tools": TOOLS, "messages": messages} for messages in UNTIDY.values()]
    code = f"import('/page/store.js').then((store) => store.exportLines({json.dumps(conversations)}))"
    lines = str(chat.evaluate(code))
    records = [json.loads(line) for line in lines.splitlines()]
    assert [len(record["messages"]) for record in records] == [3, 2, 2, 4, 4, 2], (
        "each but the first, which has no answer"
    )
    data = tmp_path / "untidy.jsonl"
    data.write_text(lines, encoding="utf-8")
    assert preview(qwen3, data, "--dump", tmp_path / "dump.jsonl", "--split_turns", "never") == 0
    assert len((tmp_path / "dump.jsonl").read_text(encoding="utf-8").splitlines()) == len(records)
