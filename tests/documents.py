"""Commands in the Markdown documents of the repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.golden import REPO

DOCUMENTS = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
PROGRAMS = (
    r"(?:[A-Z_]+=\S+ )*"
    r"(?:\.venv/bin/python|\.venv-vllm/bin/\w+|python|sh|bash|torchrun|deepspeed|accelerate|mpirun|srun|sbatch|kubectl|"
    r"pip|export)\b"
)


class Command(NamedTuple):
    """A command of a document, on one line and without its comment."""

    place: str
    text: str

    @property
    def document(self) -> str:
        return self.place.partition(":")[0]


def commands_in(document: Path) -> Iterator[Command]:
    """Commands in fenced shell blocks, in indented blocks, and in code spans."""
    language: str | None = None
    pending = ""
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        place = f"{document.relative_to(REPO)}:{number}"
        if line.lstrip().startswith("```"):
            language = None if language is not None else line.strip().strip("`")
            continue
        is_block = language in ("sh", "bash") or (language is None and line.startswith("    "))
        if is_block:
            pending += line.strip()
            if pending.endswith("\\"):
                pending = pending[:-1]
                continue
            if re.match(PROGRAMS, pending):
                yield Command(place, re.split(r"\s+#\s", pending)[0].strip())
            pending = ""
        elif language is None:
            for span in re.findall(r"`([^`]+)`", line):
                if re.match(PROGRAMS + r" \S", span):
                    yield Command(place, span)


class Block(NamedTuple):
    """A fenced block of a document; ``language`` is empty if it has none."""

    place: str
    language: str
    text: str


def blocks_in(document: Path) -> list[Block]:
    """Return the fenced blocks of a document."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(f"{document.relative_to(REPO)}:{text.count(chr(10), 0, match.start()) + 1}", match[1], match[2])
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    ]


def broken_links(document: Path) -> list[str]:
    """Return the links to files or headings that do not exist; addresses on the web are not opened."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        if not link.startswith(("http:", "https:")) and not (
            target.exists() and (not anchor or anchor in heading_anchors(target))
        ):
            broken.append(f"{document.name}: {link}")
    return broken


def heading_anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
