"""docs/models.md: its table of chat formats beside what detection finds in the official templates."""

from __future__ import annotations

from pathlib import Path

import pytest

from chat.families import EMPTY_THOUGHT, QWEN_V1, THINK, Family
from tests.families import STRICT, STYLES, load_family

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
TOOLS = {"React": "ReAct", "Hermes": "JSON", "XmlCalls": "tags", "NoneType": "none"}
ROWS = {
    "qwen1_5_launch": "Qwen1.5, as published in February 2024",
    "qwen1_5_base": "Qwen1.5 base",
    "qwen1_5": "Qwen1.5, Qwen2",
    "qwen2": "Qwen1.5, Qwen2",
    "qwen2_5": "Qwen2.5, Qwen2.5-Coder",
    "qwen2_5_coder": "Qwen2.5, Qwen2.5-Coder",
    "qwen2_5_base": "Qwen2.5 base, Qwen2.5-1M",
    "qwen2_5_math": "Qwen2.5-Math",
    "qwq_32b_preview": "QwQ-32B-Preview",
    "qwq_32b": "QwQ-32B",
    "qwen3": "Qwen3",
    "qwen3_launch": "Qwen3",
    "qwen3_instruct_2507": "Qwen3-Instruct-2507",
    "qwen3_thinking_2507": "Qwen3-Thinking-2507",
    "qwen3_5_think": "Qwen3.5-4B and larger",
    "qwen3_5_nothink": "Qwen3.5-0.8B, Qwen3.5-2B",
    "qwen3_6": "Qwen3.6",
    "qwen3_8": "Qwen3.8-27B",
}
NOT_IN_THE_TABLE = {"qwen2_5_launch", "qwq_32b_launch", "qwen3_instruct_2507_launch"}  # of GGUF files and old snapshots


def rows() -> dict[str, list[str]]:
    """Return the cells of the table of chat formats by the first one of their rows."""
    lines = PAGE.read_text(encoding="utf-8").partition("| template of |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {first.strip(): rest for first, *rest in cells}


def facts(family: Family, without_thinking: Family) -> list[str]:
    """Return what the page says of a chat format, as far as two of its families show it."""
    always = family.prompt_suffix == f"{THINK}\n" and family == without_thinking
    thinking = "always" if always else "hybrid" if family.has_thinking else "text"
    prompt = {"": "bare", f"{THINK}\n": "opens thinking", EMPTY_THOUGHT: "without thinking"}[family.prompt_suffix]
    return [
        thinking,
        prompt,
        TOOLS[type(family.tool_form).__name__],
        family.default_system or "none",
        f"`{family.name}`",
    ]


def shortened(cells: list[str]) -> list[str]:
    """Return the cells of a row without what follows in words."""
    thinking, prompt, tools, system, name = cells
    return [thinking.partition(",")[0], prompt.partition(":")[0], tools, system.partition(";")[0], name]


def test_every_official_template_has_a_row() -> None:
    assert ROWS.keys() | NOT_IN_THE_TABLE == STYLES.keys() | STRICT.keys()
    assert rows().keys() == set(ROWS.values()) | {"Qwen (v1; fixed)"}
    assert shortened(rows()["Qwen (v1; fixed)"]) == facts(QWEN_V1, QWEN_V1)


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_what_detection_finds(name: str, shared: Path) -> None:
    family, without_thinking = (load_family(shared, name, mode).family for mode in ({}, {"enable_thinking": False}))
    assert shortened(rows()[ROWS[name]]) == facts(family, without_thinking)
