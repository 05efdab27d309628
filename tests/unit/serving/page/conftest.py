"""A browser for the tests of the page, and a server and a storage of its own for each test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from tests.browser import Browser, BrowserError, Tab
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


class Tabs:
    """Tabs that tests use one after another, because a new one takes longer than most tests.

    Tests stay apart: each has an address of its own, and with it a storage of its own, which is deleted at its end.
    """

    def __init__(self, browser: Browser) -> None:
        self._browser, self._profile = browser, browser.new_profile()
        self._idle: list[Chat] = []

    def open(self, url: str, **options: Any) -> Chat:
        if not self._idle:
            return Chat(self._browser, self._profile, url, **options)
        tab = self._idle.pop()
        tab.begin(url, **options)
        return tab

    def take_back(self, tabs: list[Chat]) -> None:
        """Keep tabs for the next test; not those that no longer answer."""
        for tab in reversed(tabs):
            try:
                tab.end()
                self._idle.append(tab)
            except BrowserError:
                tab.close()
        self._browser.events.clear()


@pytest.fixture(scope="session")
def tabs() -> Iterator[Tabs]:
    browser = Browser()
    yield Tabs(browser)
    browser.close()


OpenTab = Callable[..., Chat]


@pytest.fixture
def open_url(tabs: Tabs) -> Iterator[OpenTab]:
    """Open tabs. A test fails for whatever a tab threw, or its policy forbade, and was not expected."""
    used: list[Chat] = []

    def open_one(url: str, **options: Any) -> Chat:
        used.append(tabs.open(url, **options))
        return used[-1]

    yield open_one
    faults = [fault for tab in used for fault in tab.faults()]
    tabs.take_back(used)
    # A refused request is an error line of the browser's own.
    assert [fault for fault in faults if "Failed to load resource" not in fault] == []


@pytest.fixture
def server() -> Iterator[PageServer]:
    with serve_page() as server:
        yield server


@pytest.fixture
def open_tab(open_url: OpenTab, server: PageServer) -> OpenTab:
    """Open tabs on the test's server."""
    return partial(open_url, server.url)


@pytest.fixture
def chat(open_tab: OpenTab) -> Chat:
    tab = open_tab()
    tab.wait_for("document.querySelector('#model').options.length")
    return tab
