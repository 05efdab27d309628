"""The page in the browser's language: every text has a translation, and none is left from an earlier version."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import serving.page
from tests.unit.serving.page.conftest import OpenTab

FOLDER = Path(serving.page.__file__).parent
LANGUAGES = {"zh": "chinese", "ja": "japanese"}
# Keys of the keyboard, and what is no language.
NOT_TRANSLATED = {
    "Enter",
    "Shift",
    "Esc",
    "↑",
    "+",
    '[{"type": "function", "function": {"name": "…", "parameters": {…}}}]',
}


class Texts(HTMLParser):
    """The texts of a document, except of what is shown where scripts do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._is_skipped = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._is_skipped |= tag == "noscript"
        self.found |= {value for name, value in attrs if name in ("aria-label", "title", "placeholder") and value}

    def handle_data(self, data: str) -> None:
        if data.strip() and not self._is_skipped:
            self.found.add(data.strip())


def texts() -> set[str]:
    document = Texts()
    document.feed((FOLDER / "index.html").read_text(encoding="utf-8"))
    found = document.found - NOT_TRANSLATED
    for path in FOLDER.glob("*.js"):
        found |= {
            json.loads(text) for text in re.findall(r'\bt\(("(?:[^"\\]|\\.)*")', path.read_text(encoding="utf-8"))
        }
    return found


def dictionary(language: str) -> dict[str, str]:
    lines = (FOLDER / f"{LANGUAGES[language]}.js").read_text(encoding="utf-8").splitlines()[2:-1]
    pairs = [json.loads(f"{{{line.strip().removesuffix(',')}}}") for line in lines]
    translated = {text: translation for pair in pairs for text, translation in pair.items()}
    assert len(translated) == len(pairs)
    return translated


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_translated_with_its_values(language: str) -> None:
    translated = dictionary(language)
    assert texts() - translated.keys() == set() and translated.keys() - texts() == set()
    for text, translation in translated.items():
        assert sorted(re.findall(r"\{\w+\}", translation)) == sorted(re.findall(r"\{\w+\}", text)), text


@pytest.mark.parametrize(
    ("languages", "tag", "send"),
    [("zh-TW,en", "zh-Hans", "发送"), ("fr-FR,ja,zh", "ja", "送信"), ("fr", "en", "Send")],
)
def test_the_page_follows_the_browser(open_tab: OpenTab, languages: str, tag: str, send: str) -> None:
    tab = open_tab()
    tab.call("Emulation.setUserAgentOverride", userAgent="test", acceptLanguage=languages)
    tab.reload()
    assert tab.evaluate("document.documentElement.lang") == tag
    assert tab.evaluate("document.querySelector('#send').getAttribute('aria-label')") == send
    title = {"zh-Hans": "新对话", "ja": "新しい会話", "en": "New conversation"}[tag]
    assert tab.text("#title") == title and tab.evaluate("document.title") == title
    tab.call("Emulation.setUserAgentOverride", userAgent="")
