"""A browser and a server for the tests of the page, and a tab with a storage of its own for each test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.browser import Browser, Tab
from tests.page_server import PageServer, serve_page


class Chat(Tab):
    """The page, with what tests do all the time."""

    def ask(self, text: str, *, wait: bool = True) -> None:
        """Send a message, and wait until its answer is complete."""
        self.evaluate("document.querySelector('#prompt').focus()")
        self.type(text)
        self.press("Enter")
        if wait:
            self.wait_for_answer()

    def wait_for_answer(self) -> None:
        self.wait_for("document.querySelector('.message:last-child:is(.answer) footer')?.children.length")

    def fill(self, selector: str, text: str) -> None:
        """Set a field as a user does who replaces its content."""
        field = f"document.querySelector({json.dumps(selector)})"
        assert self.evaluate(f"{field}.select(), document.activeElement === {field}"), f"{selector} cannot be used"
        self.type(text)

    def shown(self, selector: str = ".answer .text") -> list[str]:
        code = f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.innerText)"
        return [str(text) for text in self.evaluate(code)]

    def focused(self) -> str:
        return str(self.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    with serve_page() as server:
        yield server


OpenTab = Callable[..., Chat]


@pytest.fixture
def open_tab(browser: Browser, server: PageServer) -> Iterator[OpenTab]:
    """Open tabs of one profile. A test fails for whatever a tab threw, or its policy forbade, and was not expected."""
    profile = browser.new_profile()
    tabs: list[Chat] = []

    def open_one(**options: Any) -> Chat:
        tabs.append(Chat(browser, profile, server.url, **options))
        return tabs[-1]

    yield open_one
    faults = [fault for tab in tabs for fault in tab.faults()]
    browser.drop_profile(profile)
    browser.events.clear()
    # A refused request is an error line of the browser's own.
    assert [fault for fault in faults if "Failed to load resource" not in fault] == []


@pytest.fixture
def chat(open_tab: OpenTab) -> Chat:
    tab = open_tab()
    tab.wait_for("document.querySelector('#model').options.length")
    return tab
