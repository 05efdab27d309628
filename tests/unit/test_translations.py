"""Translations of README.md are in step with it: headings, commands, figures, links, and what is written as code.

The guides of docs/zh are shorter than the English documents; what they name is in those.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

from data_utils.formats import recognise
from tests.documents import DOCUMENTS, blocks_in, broken_links, commands_in
from tests.golden import REPO

ENGLISH = REPO / "README.md"
TRANSLATIONS = sorted(REPO.glob("README.*.md"))
GUIDES = sorted((REPO / "docs" / "zh").glob("*.md"))
BLOCK = re.compile(r"^```\w*\n.*?^```$|(?:^    [^\n]*\n)+", re.DOTALL | re.MULTILINE)


class Section(NamedTuple):
    """A heading and what follows it, up to the next one."""

    level: int
    title: str
    blocks: list[str]
    prose: str


def sections_of(text: str) -> list[Section]:
    """Return the sections of a document, without the comments of its commands."""
    blocks: list[str] = []

    def replace(match: re.Match[str]) -> str:
        blocks.append(match[0])
        return f"\x00{len(blocks) - 1}\x00\n"

    sections = []
    for part in re.split(r"^(?=#+ )", BLOCK.sub(replace, text), flags=re.MULTILINE):
        if heading := re.match(r"(#+) (.*)\n", part):
            own = [re.sub(r"\s+# .*", "", blocks[int(number)]) for number in re.findall("\x00(\\d+)\x00", part)]
            prose = re.sub("\x00\\d+\x00", "", part[heading.end() :])
            sections.append(Section(len(heading[1]), heading[2], own, prose))
    return sections


def links(prose: str) -> Counter[str]:
    """Return the targets of links, without those to the other languages and to guides that only one of them has."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    return Counter(link for link in targets if not re.match(r"README|docs/[a-z]+/", link))


def code_spans(prose: str) -> Counter[str]:
    return Counter(re.findall(r"`([^`]+)`", prose))


def figures(prose: str) -> Counter[str]:
    """Return the numbers that are neither code nor a part of a link."""
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"`[^`]*`|\]\([^)]*\)", "", prose)))


def drift(english: str, translated: str) -> list[str]:
    """Return what a translation lacks of the English text and what it has beside it, with the section."""
    ours, theirs = sections_of(english), sections_of(translated)
    if [section.level for section in ours] != [section.level for section in theirs]:
        missing = next((each.title for each in ours[len(theirs) :]), None)
        at = next((each.title for each, other in zip(ours, theirs, strict=False) if each.level != other.level), missing)
        return [f"{len(theirs)} headings instead of {len(ours)}, or other levels, from {at or theirs[-1].title!r} on"]
    return [
        f"section {one.title!r}: {what}"
        for one, other in zip(ours, theirs, strict=True)
        for what in drift_of_section(one, other)
    ]


def drift_of_section(one: Section, other: Section) -> Iterable[str]:
    if one.blocks != other.blocks:
        pairs = zip(one.blocks, other.blocks, strict=False)
        yield f"code blocks: {next((block for block, translated in pairs if block != translated), 'their number')}"
    for kind in (links, code_spans, figures):
        wanted, found = kind(one.prose), kind(other.prose)
        more = found - wanted
        if kind is figures:  # languages count with digits where English has words: "1 step"
            more = Counter({figure: count for figure, count in more.items() if figure not in "123456789"})
        name = kind.__name__.replace("_", " ")
        if wanted - found:
            yield f"{name} are missing: {', '.join(wanted - found)}"
        if more:
            yield f"{name} are not in English: {', '.join(more)}"


@pytest.mark.parametrize("translation", TRANSLATIONS, ids=lambda path: path.name)
def test_a_translation_is_in_step(translation: Path) -> None:
    faults = drift(ENGLISH.read_text(encoding="utf-8"), translation.read_text(encoding="utf-8"))
    assert faults == [], f"{translation.name}: " + "\n".join(faults)


@pytest.mark.parametrize("document", [ENGLISH, *TRANSLATIONS], ids=lambda path: path.name)
def test_each_language_links_to_the_others(document: Path) -> None:
    top = document.read_text(encoding="utf-8").split("\n\n")[1]
    assert re.findall(r"\(([^)]+)\)", top) == [
        path.name for path in (ENGLISH, *reversed(TRANSLATIONS)) if path != document
    ]
    assert broken_links(document) == []


def commands_of(document: Path) -> set[str]:
    return {command.text.removeprefix(".venv/bin/") for command in commands_in(document)}


def flags_of(text: str) -> set[str]:
    return set(re.findall(r"--[a-z]\w*", text))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_a_guide_names_what_the_english_documents_name(guide: Path) -> None:
    text, english = guide.read_text("utf-8"), "\n".join(document.read_text("utf-8") for document in DOCUMENTS)
    assert commands_of(guide) - set().union(*map(commands_of, DOCUMENTS)) == set()
    assert flags_of(text) - flags_of(english) == set()
    assert {figure for figure in figures(text) if len(figure) > 1} - set(figures(english)) == set()
    assert broken_links(guide) == []
    for block in blocks_in(guide):
        if block.language == "json":
            recognise(json.loads(block.text), block.place)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("## Two", "### Two", "2 headings instead of 2, or other levels, from 'Two' on"),
        ("## Two\n", "", "1 headings instead of 2, or other levels, from 'Two' on"),
        ("1.8", "1.7", "section 'One': figures are missing: 1.8"),
        ("`--flag`", "--flag", "section 'Two': code spans are missing: --flag"),
        ("docs/a.md", "docs/b.md", "section 'Two': links are missing: docs/a.md"),
        ("run --all", "run", "section 'One': code blocks: ```sh\nrun --all\n```"),
    ],
)
def test_what_drifted_is_named(old: str, new: str, what: str) -> None:
    english = "# One\n\n1.8 times\n\n```sh\nrun --all  # a comment\n```\n\n## Two\n\n[A](docs/a.md) has `--flag`.\n"
    assert drift(english, english.replace("a comment", "ein Kommentar").replace("1.8 times", "1 x 1.8")) == []
    assert what in drift(english, english.replace(old, new))
