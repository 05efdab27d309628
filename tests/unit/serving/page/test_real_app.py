"""The page on the real server: a tiny model's answers, and calls and thinking that the server reads from a script."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from chat.families import ANSWER_STYLES, QWEN_V1
from serving.api.settings import Settings
from tests.serving import load_engine
from tests.serving_api import ScriptedEngine, served, wait_until
from tests.unit.serving.page.conftest import Chat, OpenTab

OpenPage = Callable[[str], Chat]


@pytest.fixture
def open_page(open_url: OpenTab) -> OpenPage:
    def open_one(url: str) -> Chat:
        chat = open_url(url)
        chat.wait_for("document.querySelector('#model').options.length || document.querySelector('#key-dialog').open")
        return chat

    return open_one


def last_answer(chat: Chat) -> dict[str, Any]:
    kept = "Object.entries(localStorage).find(([key]) => key.includes('conversation'))[1]"
    answer: dict[str, Any] = json.loads(chat.evaluate(kept))["messages"][-1]
    return answer


def post(chat: Chat, path: str, body: dict[str, Any]) -> Any:
    """Ask the page's server from the page, and return its reply."""
    options = {"method": "POST", "body": json.dumps(body), "headers": {"Content-Type": "application/json"}}
    return chat.evaluate(f"fetch('/v1/{path}', {json.dumps(options)}).then((answer) => answer.json())")


def test_answer_of_a_model_is_that_of_the_api(open_page: OpenPage) -> None:
    with load_engine() as engine, served(engine) as url:
        chat = open_page(url)
        chat.click("[data-opens=settings]")
        for selector, text in {"#system": "Be brief. 简短", "#temperature": "0", "#max_tokens": "12"}.items():
            chat.fill(selector, text)
        chat.ask("Who are you? 🙂")
        answer = last_answer(chat)
        messages = [{"role": "system", "content": "Be brief. 简短"}, {"role": "user", "content": "Who are you? 🙂"}]
        body = {"model": answer["model"], "messages": messages, "temperature": 0, "max_tokens": 12}
        reply = post(chat, "chat/completions", body)
    assert "error" not in answer and answer["content"]
    assert answer["content"] == reply["choices"][0]["message"]["content"]
    assert answer["finish"] == reply["choices"][0]["finish_reason"]
    assert answer["usage"]["completion_tokens"] == reply["usage"]["completion_tokens"]


def test_time_limit_of_the_server_is_told_from_its_limit_of_tokens(open_page: OpenPage) -> None:
    """The time is over before the first token."""
    bodies = {"chat/completions": {"messages": [{"role": "user", "content": "Q"}]}, "completions": {"prompt": "Q"}}
    with load_engine(request_timeout=1e-6) as engine, served(engine) as url:
        chat = open_page(url)
        chat.ask("Question")
        notice = chat.text(".notice")
        replies = [post(chat, path, {"model": engine.model_name, **body}) for path, body in bodies.items()]
    assert "limit of time" in notice
    for reply in replies:
        [choice] = reply["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "timeout")


def test_stopped_answer_frees_its_place(open_page: OpenPage) -> None:
    engine = ScriptedEngine(lambda _: ["word "] * 1000, pause=0.005)
    with served(engine) as url:
        chat = open_page(url)
        chat.ask("Question", wait=False)
        chat.wait_for("document.querySelector('.answer .text').innerText.length > 20")
        chat.press("Escape")
        wait_until(lambda: engine.load_now().running == 0)
    assert last_answer(chat)["finish"] == "stopped"


def test_call_of_qwen_v1_is_shown_and_its_result_answered(open_page: OpenPage) -> None:
    call = ["Thought: I should look.\nAct", 'ion: get_weather\nAction Input: {"city": "Ulm"}\n']
    script = iter([call, ["Thought: I now know.\nFinal Answer: Mild", " 🙂."]])
    engine = ScriptedEngine(lambda _: next(script), QWEN_V1)
    with served(engine) as url:
        chat = open_page(url)
        parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
        function = {"name": "get_weather", "description": "The weather", "parameters": parameters}
        chat.evaluate("document.querySelector('#settings details').open = true")
        chat.click("[data-opens=settings]")
        chat.fill("#tools", json.dumps([{"type": "function", "function": function}]))
        chat.ask("How warm is it in Ulm?")
        assert json.loads(chat.text(".call pre")) == {"city": "Ulm"}
        chat.fill(".results textarea", "20 degrees")
        chat.click(".results button")
        chat.wait_for_answer()
        assert chat.shown()[-1] == "Mild 🙂."
        assert "Observation: 20 degrees" in engine.prompt_of()


def test_thinking_of_qwen3_is_folded(open_page: OpenPage) -> None:
    family = next(family for family in ANSWER_STYLES if family.name == "chatml-hybrid")
    engine = ScriptedEngine(lambda _: ["<thi", "nk>\nEasy.\n</think>", "\n\nFour"], family)
    with served(engine) as url:
        chat = open_page(url)
        chat.ask("2 + 2?")
    assert chat.shown() == ["Four"]
    assert chat.evaluate("document.querySelector('.thinking .fold-body').textContent.trim()") == "Easy."


def test_adapter_and_key_are_those_of_the_server(open_page: OpenPage) -> None:
    engine = ScriptedEngine(lambda _: ["Yes"])
    with served(engine, Settings(api_key="secret")) as url:
        chat = open_page(url)
        chat.wait_for("document.querySelector('#key-dialog').open")
        chat.type("secret")
        chat.press("Enter")
        chat.wait_for("document.querySelector('#model').options.length === 2")
        chat.evaluate("document.querySelector('#model').value = 'tiny:poet'")
        chat.ask("Question")
    assert (chat.shown(), engine.requests[0].adapter) == (["Yes"], "poet")


def test_refusal_of_the_server_names_the_value(open_page: OpenPage) -> None:
    with served(ScriptedEngine(lambda _: ["Yes"])) as url:
        chat = open_page(url)
        chat.click("[data-opens=settings]")
        chat.fill("#stop-texts", "\n".join(map(str, range(17))))
        chat.ask("Question")
        assert chat.text(".notice.error span") == "The server refused: stop has 17 strings; 16 is the most"
