"""Conversations are kept in the browser: across reloads and tabs, exported, deleted, and when there is no room."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from data_utils.files import read_records
from tests.page_server import PageServer, event, finish, said
from tests.unit.serving.page.conftest import Chat, OpenTab

TITLES = "#conversations .open"


def test_reload_restores_conversations_and_goes_on(chat: Chat, server: PageServer) -> None:
    server.answer(said("**One**"), said("Two"), said("Three"))
    chat.ask("First conversation")
    chat.click("#new")
    chat.ask("Second conversation")
    chat.reload()
    assert chat.shown(TITLES) == ["Second conversation", "First conversation"]
    assert chat.shown() == ["Two"]
    chat.click("#conversations li:last-child .open")
    assert chat.shown() == ["One"] and chat.count(".answer strong") == 1
    chat.ask("And more")
    assert [message["content"] for message in server.requests[2]["messages"]] == [
        "First conversation",
        "**One**",
        "And more",
    ]


def test_reload_in_the_middle_keeps_what_came(chat: Chat, server: PageServer) -> None:
    gate = threading.Event()
    server.answer([event(content="Half of it"), gate, finish()], said("All of it"))
    chat.ask("Question", wait=False)
    chat.wait_for("document.querySelector('.answer .text')?.innerText === 'Half of it'")
    chat.reload()
    assert server.left.wait(5)
    assert chat.shown() == ["Half of it"]
    assert chat.text(".notice") == "The page was closed before the answer was complete."
    chat.click("[aria-label='Answer again']")
    chat.wait_for("document.querySelector('.answer .text').innerText === 'All of it'")


def test_two_tabs_show_each_others_messages(chat: Chat, server: PageServer, open_tab: OpenTab) -> None:
    server.answer(said("One"), said("Two"))
    chat.ask("First")
    other = open_tab()
    assert other.shown() == ["One"]
    other.ask("Second")
    chat.wait_for("document.querySelectorAll('.answer').length === 2")
    assert chat.shown() == ["One", "Two"]


def test_two_tabs_that_answer_at_once_lose_nothing(chat: Chat, server: PageServer, open_tab: OpenTab) -> None:
    gate = threading.Event()
    server.answer(said("One"), [event(content="Slow"), gate, finish()], said("Quick"))
    chat.ask("First")
    other = open_tab()
    chat.ask("From the first tab", wait=False)
    chat.wait_for("document.querySelectorAll('.answer')[1]?.querySelector('.text').innerText === 'Slow'")
    other.wait_for("document.querySelectorAll('.answer').length === 2")
    # The other tab has its own view of the conversation, and goes on with it.
    other.ask("From the other tab", wait=False)
    other.wait_for("document.querySelectorAll('.answer').length === 3 && document.querySelector('#stop').hidden")
    gate.set()
    chat.wait_for_answer()
    assert sorted(chat.shown(TITLES)) == ["First", "First (this tab)"]
    kept = " ".join(chat.evaluate("Object.values(localStorage)"))
    assert all(text in kept for text in ("From the first tab", "From the other tab", "Quick"))


def exported(chat: Chat, selector: str) -> str:
    chat.evaluate("URL.createObjectURL = (blob) => { window.exported = blob.text(); return '#'; }")
    chat.click(selector)
    return str(chat.evaluate("window.exported"))


def test_export_is_training_data(chat: Chat, server: PageServer, tmp_path: Path) -> None:
    server.answer([event(reasoning_content="Easy."), *said("四")], said("Two"))
    chat.ask("2 + 2?")
    chat.click("#new")
    chat.ask("1 + 1?")
    file = tmp_path / "conversations.jsonl"
    file.write_text(exported(chat, "#export-all"), encoding="utf-8")
    assert [record for _, record in read_records(file)] == [
        {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "Two"}]},
        {"messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "四", "reasoning_content": "Easy."},
        ]},
    ]  # fmt: skip
    assert len(exported(chat, "#conversations [aria-label^=Export]").splitlines()) == 1


def test_deleted_conversation_comes_back_with_undo(chat: Chat, server: PageServer) -> None:
    server.answer(said("One"))
    chat.ask("Question")
    chat.click("[aria-label='Delete Question']")
    assert chat.shown(TITLES) == [] and chat.count(".message") == 0
    assert "One" not in json.dumps(chat.evaluate("Object.values(localStorage)"))
    chat.click("#toast button")
    assert chat.shown(TITLES) == ["Question"]


@pytest.mark.parametrize("is_other", [False, True], ids=["in this tab", "in another tab"])
def test_deleted_while_it_is_answered_stays_deleted(
    chat: Chat, server: PageServer, open_tab: OpenTab, is_other: bool
) -> None:
    gate = threading.Event()
    server.answer([event(content="Half"), gate, event(content=" and all"), finish()])
    chat.ask("Question", wait=False)
    chat.wait_for("document.querySelector('.answer .text')?.innerText === 'Half'")
    deleting = open_tab() if is_other else chat
    deleting.click("[aria-label='Delete Question']")
    chat.wait_for("document.querySelectorAll('.message').length === 0 && document.querySelector('#stop').hidden")
    assert server.left.wait(5), "nobody reads the answer"
    gate.set()
    assert is_other == ("in another tab" in chat.text("#toast"))
    chat.reload()
    assert chat.shown(TITLES) == [] and "Question" not in " ".join(chat.evaluate("Object.values(localStorage)"))


def test_undo_brings_back_what_had_been_answered(chat: Chat, server: PageServer) -> None:
    server.answer([event(content="Half"), threading.Event(), finish()])
    chat.ask("Question", wait=False)
    chat.wait_for("document.querySelector('.answer .text')?.innerText === 'Half'")
    chat.click("[aria-label='Delete Question']")
    chat.click("#toast button")
    chat.click(TITLES)
    assert chat.shown() == ["Half"] and chat.text(".notice") == "Stopped."


def test_all_are_deleted_after_a_question(chat: Chat, server: PageServer) -> None:
    server.answer(said("One"))
    chat.ask("Question")
    chat.click("#delete-all")
    assert chat.text("#confirm-text") == "Delete 1 conversation? This cannot be undone."
    chat.press("Escape")
    assert chat.shown(TITLES) == ["Question"]
    chat.click("#delete-all")
    chat.click("#confirm-yes")
    chat.wait_for("document.querySelectorAll('.message').length === 0")
    assert chat.evaluate("Object.keys(localStorage).filter((key) => key.includes('conversation'))") == []


def test_full_storage_is_said_and_the_chat_goes_on(chat: Chat, server: PageServer) -> None:
    server.answer(said("Still here"))
    chat.evaluate("localStorage.setItem('filler', 'x'.repeat(5 * 1024 * 1024 - 40))")
    chat.ask("A question that is longer than what is left")
    assert chat.shown() == ["Still here"]
    assert "storage is full" in chat.text("#banner")


FILL = """for (let size = 1 << 22, number = 0; size; size >>= 1) {
  try { for (;;) localStorage.setItem(`filler${number++}`, 'x'.repeat(size)); } catch { }
}"""


def test_conversation_is_kept_once_there_is_room_again(chat: Chat, server: PageServer) -> None:
    server.answer(said("long " * 500), said("One"), said("Two"), said("Three"))
    chat.ask("Large")
    chat.click("#new")
    chat.ask("First")
    chat.evaluate(FILL)
    chat.ask("Second " * 50)
    chat.click("[data-opens=settings]")
    chat.fill("#system", "Be brief. " * 20)  # settings have no room either
    assert "storage is full" in chat.text("#banner")
    chat.click("[aria-label='Delete Large']")
    assert chat.evaluate("document.querySelector('#banner').hidden")
    chat.ask("Third")
    assert chat.shown(TITLES) == ["First"]
    chat.reload()
    assert chat.shown() == ["One", "Two", "Three"]


def test_damaged_storage_is_skipped(chat: Chat, server: PageServer) -> None:
    server.answer(said("One"))
    chat.ask("Question")
    chat.evaluate("localStorage.setItem('qwen-chat:conversation:x', '{broken')")
    chat.evaluate("localStorage.setItem('qwen-chat:conversation:y', '{\"id\": \"y\"}')")
    chat.evaluate("localStorage.setItem('qwen-chat:settings', '[')")
    chat.reload()
    assert chat.shown(TITLES) == ["Question"] and chat.shown() == ["One"]
