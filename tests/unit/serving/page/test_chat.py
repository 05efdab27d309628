"""Questions and answers on the page, in a real browser, with a server that says what each test needs."""

from __future__ import annotations

import json
import threading

from tests.browser import SHIFT
from tests.page_server import PageServer, Step, event, finish, said
from tests.unit.serving.page.conftest import Chat, OpenTab

WEATHER = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}


def test_characters_survive_any_split_of_the_stream(chat: Chat, server: PageServer) -> None:
    text = "中文 🙂 é مرحبا"
    stream = event(content=text) + finish()
    server.answer([stream[at : at + 1] for at in range(len(stream))])
    chat.ask("问题 🙂")
    assert chat.shown() == [text]
    assert server.requests[0]["messages"] == [{"role": "user", "content": "问题 🙂"}]


def test_answer_appears_while_it_streams_and_escape_stops_it(chat: Chat, server: PageServer) -> None:
    gate = threading.Event()
    server.answer([event(content="The first "), event(content="half"), gate, event(content=" and more"), finish()])
    chat.ask("Question", wait=False)
    chat.wait_for("document.querySelector('.answer .text')?.innerText === 'The first half'")
    assert chat.evaluate("document.querySelector('.answer').getAttribute('aria-busy')") == "true"
    chat.press("Escape")
    assert server.left.wait(5), "the connection is closed, so the server can end the answer"
    chat.wait_for_answer()
    assert chat.shown() == ["The first half"] and chat.text(".notice") == "Stopped."
    assert chat.evaluate("document.querySelector('#stop').hidden && !document.querySelector('#send').hidden")


def test_answer_again_replaces_the_last_answer(chat: Chat, server: PageServer) -> None:
    server.answer(said("One"), said("Two"), said("Three"))
    chat.ask("First question")
    chat.ask("Second question")
    assert chat.count("[aria-label='Answer again']") == 1
    chat.click("[aria-label='Answer again']")
    chat.wait_for("document.querySelector('.message:last-child .text')?.innerText === 'Three'")
    chat.wait_for_answer()
    assert chat.shown() == ["One", "Three"]
    assert server.requests[2] == server.requests[1]
    assert [message["content"] for message in server.requests[2]["messages"]] == [
        "First question", "One", "Second question",
    ]  # fmt: skip


def test_edited_message_replaces_what_follows_it(chat: Chat, server: PageServer) -> None:
    server.answer(said("One"), said("Two"), said("Three"))
    chat.ask("First")
    chat.ask("Second")
    chat.evaluate("document.querySelector('.question [aria-label^=Edit]').click()")
    chat.fill(".edit textarea", "Changed")
    chat.press("Enter")
    chat.wait_for("document.querySelectorAll('.message').length === 2")
    chat.wait_for_answer()
    assert (chat.shown(".bubble"), chat.shown()) == (["Changed"], ["Three"])
    assert server.requests[2]["messages"] == [{"role": "user", "content": "Changed"}]


def test_settings_are_sent_and_kept_and_empty_ones_are_not_sent(chat: Chat, server: PageServer) -> None:
    server.answer(said("Yes"))
    chat.ask("Question")
    assert server.requests[0] == {
        "model": "tiny", "messages": [{"role": "user", "content": "Question"}], "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    chat.click("[data-opens=settings]")
    values = {"#system": "Be brief.", "#temperature": "0.5", "#top_k": "20", "#seed": "7", "#stop-texts": "END\nSTOP"}
    for selector, text in values.items():
        chat.fill(selector, text)
    chat.fill("#top_p", "2")
    assert chat.text("#top_p-fault") == "Between 0 and 1."
    chat.fill("#max_tokens", "1.5")
    assert chat.text("#max_tokens-fault") == "A whole number is needed."
    for name, value in (("thinking", "off"), ("reasoning_effort", "low")):
        field = f"document.querySelector('#{name}')"
        chat.evaluate(f"{field}.value = '{value}', {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")
    chat.reload()
    chat.wait_for("document.querySelector('#model').options.length")
    chat.ask("Again")
    sent = server.requests[1]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: sent.get(name) for name in ("temperature", "top_k", "seed", "stop", "top_p", "max_tokens")} == {
        "temperature": 0.5, "top_k": 20, "seed": 7, "stop": ["END", "STOP"], "top_p": None, "max_tokens": None,
    }  # fmt: skip
    assert (sent["chat_template_kwargs"], sent["reasoning_effort"]) == ({"enable_thinking": False}, "low")


def test_two_tabs_keep_each_others_settings(chat: Chat, open_tab: OpenTab) -> None:
    other = open_tab()
    for tab, values in ((other, {"#temperature": "0.5"}), (chat, {"#top_k": "20", "#system": "Be brief."})):
        tab.click("[data-opens=settings]")
        for selector, text in values.items():
            tab.fill(selector, text)
    other.fill("#top_p", "0.9")
    chat.reload()
    names = ("temperature", "top_p", "top_k", "system")
    kept = [chat.evaluate(f"document.querySelector('#{name}').value") for name in names]
    assert kept == ["0.5", "0.9", "20", "Be brief."]


def test_chosen_adapter_answers_and_is_remembered(server: PageServer, open_tab: OpenTab) -> None:
    server.models = ["base", "base:linden"]
    server.answer(said("Linden"))
    chat = open_tab()
    chat.wait_for("document.querySelector('#model').options.length === 2")
    chat.evaluate("document.querySelector('#model').value = 'base:linden'")
    chat.evaluate("document.querySelector('#model').dispatchEvent(new Event('change'))")
    chat.reload()
    chat.wait_for("document.querySelector('#model').value === 'base:linden'")
    chat.ask("Who are you?")
    assert server.requests[0]["model"] == "base:linden" and "base:linden" in chat.text(".figures")


def test_thinking_is_folded_beside_the_answer(chat: Chat, server: PageServer) -> None:
    server.answer([event(reasoning_content="Let me "), event(reasoning_content="see."), *said("Four")])
    chat.ask("2 + 2?")
    assert chat.shown() == ["Four"] and not chat.evaluate("document.querySelector('.thinking').open")
    chat.click(".thinking summary")
    assert chat.text(".thinking .fold-body") == "Let me see."
    chat.ask("And 3 + 3?")
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": "Four"}
    server.has_thinking = True  # another model, which reads what it needs of it
    chat.reload()
    chat.wait_for("document.querySelector('#model').options.length")
    chat.ask("And 4 + 4?")
    assert server.requests[2]["messages"][1]["reasoning_content"] == "Let me see."


def test_calls_are_shown_and_their_results_sent(chat: Chat, server: PageServer) -> None:
    parts = [{"index": 0, "function": {"arguments": text}} for text in ('{"city"', ': "Ulm"}')]
    calls = [event(tool_calls=[WEATHER]), *(event(tool_calls=[part]) for part in parts), finish("tool_calls")]
    server.answer(calls, said("It is mild."))
    chat.click("[data-opens=settings]")
    chat.evaluate("document.querySelector('#settings details').open = true")
    chat.fill("#tools", '[{"type": "function", "function": {"name": "get_weather"}}]')
    chat.ask("How warm is it in Ulm?")
    assert server.requests[0]["tools"][0]["function"]["name"] == "get_weather"
    assert chat.text(".call .call-name") == "Calls get_weather" and chat.text(".call pre") == '{\n  "city": "Ulm"\n}'
    chat.fill(".results textarea", "20 degrees")
    chat.click(".results button")
    chat.wait_for_answer()
    assert chat.shown()[-1] == "It is mild."
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Ulm"}'}}
    assert server.requests[1]["messages"][1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "20 degrees"},
    ]


def test_question_instead_of_a_result_leaves_the_call_out(chat: Chat, server: PageServer) -> None:
    call = {**WEATHER, "function": {"name": "get_weather", "arguments": "{}"}}
    server.answer([event(content="Let me look."), event(tool_calls=[call]), finish("tool_calls")], said("Never mind."))
    chat.ask("How warm is it?")
    chat.ask("Do not look.")
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": "Let me look."}


REFUSALS = [
    (400, "seed is too large", "The server refused: seed is too large"),
    (503, "full", "The server is busy. Retry in a moment."),
    (500, "out of memory", "The server failed (500). out of memory"),
    (504, "", "The request took too long (504). Retry, or ask for a shorter answer."),
]


def test_refusal_is_said_in_plain_words_and_can_be_retried(chat: Chat, server: PageServer) -> None:
    server.answer(said("Now it works"))
    server.refusals.extend((status, message) for status, message, _ in REFUSALS)
    chat.ask("Question")
    for _, _, shown in REFUSALS:
        chat.wait_for(f"document.querySelector('.notice.error span')?.innerText === {json.dumps(shown)}")
        chat.click(".notice.error button")
    chat.wait_for("document.querySelector('.answer .text').innerText === 'Now it works'")
    chat.wait_for_answer()
    assert chat.count(".notice.error:not([hidden])") == 0
    assert server.requests == [server.requests[0]] * (len(REFUSALS) + 1)


BREAKS: list[tuple[list[Step], str]] = [
    ([], "The server ended the answer before it was complete."),
    ([b'data: {"error": {"message": "no memory"}}\n\n'], "The server ended the answer: no memory"),
    ([b"data: {nothing\n\n"], "The server sent something that is no answer."),
]


def test_answer_that_breaks_off_keeps_its_beginning(chat: Chat, server: PageServer) -> None:
    server.answer(*([event(content="Half"), *end] for end, _ in BREAKS))
    for _ in BREAKS:
        chat.ask("Question")
    assert chat.shown() == ["Half"] * 3
    assert chat.shown(".notice.error span") == [shown for _, shown in BREAKS]


def test_server_that_is_gone_is_said_and_asked_again(chat: Chat, server: PageServer) -> None:
    server.answer(said("Back"))
    chat.be_offline()
    chat.ask("Question")
    assert chat.text(".notice.error span").startswith("The server cannot be reached.")
    chat.be_offline(False)
    chat.click(".notice.error button")
    chat.wait_for("document.querySelector('.answer .text').innerText === 'Back'")


def test_server_that_starts_after_the_page_is_found(server: PageServer, open_tab: OpenTab) -> None:
    models, server.models = server.models, []
    server.answer(said("Here"))
    chat = open_tab()
    chat.wait_for("document.querySelector('#model').hidden")
    server.models = models
    chat.ask("Question")
    assert (server.requests[0]["model"], chat.shown()) == ("tiny", ["Here"])


def test_server_with_another_model_is_asked_for_its_models(chat: Chat, server: PageServer) -> None:
    server.answer(said("Here"))
    server.models = ["other"]
    chat.ask("Question")
    assert chat.text(".notice.error span") == "The server no longer has this model. tiny is not loaded"
    chat.click(".notice.error button")
    chat.wait_for("document.querySelector('.answer .text').innerText === 'Here'")
    assert (server.requests[1]["model"], chat.shown("#model option")) == ("other", ["other"])


def test_limit_that_ended_an_answer_is_named(chat: Chat, server: PageServer) -> None:
    server.answer(
        [event(content="Long"), finish("length")], [event(content="Slow"), finish("length", stop_reason="timeout")]
    )
    chat.ask("Question")
    assert "limit of tokens" in chat.text(".notice")
    chat.ask("Question")
    notice = chat.text(".message:last-child .notice")
    assert "limit of time" in notice and "Longest answer" not in notice


def test_key_is_asked_for_and_used(server: PageServer, open_tab: OpenTab) -> None:
    server.key = "secret"
    server.answer(said("Welcome"))
    chat = open_tab()
    chat.wait_for("document.querySelector('#key-dialog').open")
    assert chat.text("#key-reason") == "This server wants an API key."
    chat.type("wrong")
    chat.press("Enter")
    chat.wait_for("document.querySelector('#key-reason').innerText === 'The server does not accept this API key.'")
    chat.type("secret")
    chat.press("Enter")
    chat.wait_for("document.querySelector('#model').options.length")
    chat.ask("Hello")
    assert chat.shown() == ["Welcome"]
    assert chat.evaluate("localStorage.getItem('qwen-chat:key')") is None, "it stays in the tab unless asked to"


def test_keyboard_alone_is_enough(chat: Chat, server: PageServer) -> None:
    server.answer(said("One"), said("Two"))
    assert chat.focused() == "Message"
    chat.press("Enter")  # nothing to send
    chat.type("Two")
    chat.press("Enter", SHIFT)
    chat.type("lines")
    chat.press("Enter")
    chat.wait_for_answer()
    assert server.requests[0]["messages"][0]["content"] == "Two\nlines" and len(server.requests) == 1
    chat.press("ArrowUp")
    assert chat.focused() == "Edit message"
    chat.press("Escape")
    assert chat.focused() == "Edit and send again" and chat.shown(".bubble") == ["Two\nlines"]
    order = []
    for _ in range(8):
        chat.press("Tab")
        order.append(chat.focused())
    assert order[:3] == ["Copy answer", "Answer again", "Message"], order
    assert chat.text("#status") == "Answer complete. One"


def test_enter_of_an_input_method_does_not_send(chat: Chat, server: PageServer) -> None:
    server.answer(said("好"))
    chat.call("Input.imeSetComposition", text="ni hao", selectionStart=6, selectionEnd=6)
    parts = {"key": "Process", "code": "Enter", "windowsVirtualKeyCode": 229}
    chat.call("Input.dispatchKeyEvent", type="rawKeyDown", **parts)
    assert server.requests == []
    chat.type("你好")
    chat.press("Enter")
    chat.wait_for_answer()
    assert server.requests[0]["messages"][0]["content"] == "你好"


def test_code_is_copied_as_it_is(chat: Chat, server: PageServer) -> None:
    code = "def f():\n\treturn '<b>'  # 中文"
    server.answer(said(f"So:\n```python\n{code}\n```\nDone."))
    chat.ask("Question")
    chat.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    chat.click("[aria-label='Copy python code']")
    chat.wait_for("window.copied !== undefined && document.querySelector('#status').textContent === 'Copied'")
    assert chat.evaluate("window.copied") == code
