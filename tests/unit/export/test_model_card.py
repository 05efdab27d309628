"""The model card of a merged folder: its contents, what it must not reveal, and hostile names."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from export.model_card import CardFacts, code, write_model_card
from loading.opened_by import published_commands

HUB_BASE = "Qwen/Qwen-7B-Chat"
HOSTILE = "a: b\n---\n# c `` ` [x](y) <b> {{z}} \u202e|"

SUMMARY = {
    "base_model": "/home/someone/secret/base", "steps": 1200, "trained_tokens": 34567, "first_loss": 2.5,
    "last_loss": 0.3214567, "last_eval_loss": 0.51, "data": {"train": {"path": "/a/b.jsonl", "kept": 1, "tokens": 2}},
}  # fmt: skip
SOURCES = [
    {"path": "/home/someone/secret/chats.jsonl", "kept": 1500, "samples": ["PRIVATE"]},
    {"path": "C:\\Users\\someone\\more.json", "kept": 20},
]
DATA_REPORT = {
    "train": {"path": "2 sources", "kept": 1520, "tokens": 98765, "trained_tokens": 4321, "sources": SOURCES},
    "eval": {"path": "x/held.json", "kept": 30, "tokens": 400, "trained_tokens": 100},
}


@pytest.fixture
def facts(tmp_path: Path) -> CardFacts:
    base, adapter = tmp_path / "base", tmp_path / "secret" / "tuned"
    base.mkdir()
    adapter.mkdir(parents=True)
    return CardFacts(
        name="merged", base=HUB_BASE, base_folder=base, adapters=((adapter, 1.0),), layout="qwen", model_type="qwen",
        dtype="bfloat16", changed="10 of 19 tensors changed", verification=("verified: 12 prompts, 400 tokens",),
    )  # fmt: skip


def card_of(folder: Path, facts: CardFacts) -> tuple[str, dict[str, Any], str]:
    """Return the whole card, its front matter and its body, the latter two as the hub's library reads them."""
    folder.mkdir(exist_ok=True)
    path = write_model_card(folder, facts)
    assert path == folder / "README.md"
    card = ModelCard.load(path)
    return path.read_text(encoding="utf-8"), card.data.to_dict(), card.text


def write_records(adapter: Path, summary: Any = SUMMARY, report: Any = DATA_REPORT) -> None:
    (adapter / "run_summary.json").write_text(json.dumps(summary))
    (adapter / "data_receipt.json").write_text(json.dumps(report))


def test_front_matter_for_the_hub(tmp_path: Path, facts: CardFacts) -> None:
    _, data, _ = card_of(tmp_path / "out", facts)
    assert data == {
        "base_model": HUB_BASE, "base_model_relation": "finetune", "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["qwen", "lora-merged", "custom_code"], "license": "unknown",
    }  # fmt: skip
    other = facts.adapters[0][0].with_name("other")
    several = replace(facts, adapters=(*facts.adapters, (other, 0.3)), layout="qwen2")
    _, data, text = card_of(tmp_path / "out", several)
    assert data["base_model_relation"] == "merge" and data["tags"] == ["qwen", "lora-merged"]
    assert "- `tuned`, weight 1\n- `other`, weight 0.3\n" in text


def test_base_folder_is_named_by_its_last_part(
    tmp_path: Path, facts: CardFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for base in (str(facts.base_folder), "../models/base", "base", "a/b/base"):
        _, data, text = card_of(tmp_path / "out", replace(facts, base=base))
        assert "base_model" not in data and "base_model_relation" not in data
        assert "`base` with a LoRA adapter merged into its weights" in text
    # A local folder whose path looks like a hub id.
    (tmp_path / "Qwen" / "Qwen-7B-Chat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    whole, data, _ = card_of(tmp_path / "out", facts)
    assert "base_model" not in data and "huggingface.co" not in whole


def test_training_figures(tmp_path: Path, facts: CardFacts) -> None:
    write_records(facts.adapters[0][0])
    whole, _, text = card_of(tmp_path / "out", facts)
    section = text.partition("## Training\n\n")[2].partition("\n\n##")[0]
    assert section.splitlines() == [
        "- 1,200 optimizer steps over 34,567 trained tokens",
        "- training loss 2.5 -> 0.3215",
        "- evaluation loss 0.51",
        "- `train` data: 1,520 conversations, 98,765 tokens, 4,321 of them trained",
        "- `train` data: `chats.jsonl`, 1,500 conversations",
        "- `train` data: `more.json`, 20 conversations",
        "- `eval` data: 30 conversations, 400 tokens, 100 of them trained",
        "- `eval` data: `held.json`, 30 conversations",
    ]
    for private in ("someone", "secret", "PRIVATE", str(tmp_path)):
        assert private not in whole


def test_training_figures_of_several_adapters_are_labelled(tmp_path: Path, facts: CardFacts) -> None:
    write_records(facts.adapters[0][0], report={})
    other = tmp_path / "other"
    other.mkdir()
    _, _, text = card_of(tmp_path / "out", replace(facts, adapters=(*facts.adapters, (other, 2.0))))
    assert "- `tuned`: training loss 2.5 -> 0.3215\n" in text and "`train` data: `b.jsonl`, 1 conversations" in text


@pytest.mark.parametrize(
    ("summary", "report"),
    [
        ({}, {}),
        ([], "text"),
        ({"steps": "<b>", "first_loss": None, "last_eval_loss": []}, {"train": 3, "eval": {"sources": [1, None]}}),
        ({"steps": True, "data": 7}, {"train": {"sources": "no", "path": None}}),
    ],
)
def test_records_with_unexpected_values(tmp_path: Path, facts: CardFacts, summary: Any, report: Any) -> None:
    write_records(facts.adapters[0][0], summary, report)
    whole, _, _ = card_of(tmp_path / "out", facts)
    assert "<b>" not in whole and "None" not in whole


def test_broken_record_is_ignored(tmp_path: Path, facts: CardFacts) -> None:
    (facts.adapters[0][0] / "run_summary.json").write_bytes(b"\xff{")
    _, _, text = card_of(tmp_path / "out", facts)
    assert "Training" not in text


def test_checkpoint_section(tmp_path: Path, facts: CardFacts) -> None:
    _, _, text = card_of(tmp_path / "out", facts)
    for line in ("layout: `qwen`, stored in `bfloat16`", "`10 of 19 tensors changed`"):
        assert f"- {line}\n" in text
    assert "- `verified: 12 prompts, 400 tokens`\n" in text and "not verified" not in text
    _, _, text = card_of(tmp_path / "out", replace(facts, verification=()))
    assert "**not verified**" in text


# ---------------------------------------------------------------------------------------------------------- licences


def test_licence_files_of_the_base_are_copied(tmp_path: Path, facts: CardFacts) -> None:
    (facts.base_folder / "LICENSE").write_text("the terms")
    (facts.base_folder / "Notice.txt").write_text("a notice")
    (facts.base_folder / "LICENSES").mkdir()
    _, data, text = card_of(tmp_path / "out", facts)
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "license-of-the-base", "LICENSE")
    assert "[LICENSE](LICENSE), [Notice.txt](Notice.txt)" in text and "Apache License 2.0" in text
    assert (tmp_path / "out" / "LICENSE").read_text() == "the terms"
    assert (tmp_path / "out" / "Notice.txt").read_text() == "a notice"


def test_licence_metadata_of_the_base_is_copied(tmp_path: Path, facts: CardFacts) -> None:
    terms = {"license": "other", "license_name": "tongyi-qianwen", "license_link": "https://example.org/x: y"}
    (facts.base_folder / "README.md").write_text(f"---\n{yaml.safe_dump({**terms, 'tags': ['x']})}---\nText\n")
    _, data, _ = card_of(tmp_path / "out", facts)
    assert {key: data[key] for key in terms} == terms and "x" not in data["tags"]


@pytest.mark.parametrize(
    "card", [b"---\na: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe", b"---\nlicense: [a]\n---\n", b""]
)
def test_broken_card_of_the_base_is_ignored(tmp_path: Path, facts: CardFacts, card: bytes) -> None:
    (facts.base_folder / "README.md").write_bytes(card)
    _, data, text = card_of(tmp_path / "out", facts)
    assert data["license"] == "unknown" and "The base's folder has no licence file" in text


# ------------------------------------------------------------------------------------------------------ hostile names


def test_no_name_is_interpreted_as_markup(tmp_path: Path, facts: CardFacts) -> None:
    adapter = tmp_path / HOSTILE
    adapter.mkdir()
    write_records(adapter, report={HOSTILE: {"sources": [{"path": f"x/{HOSTILE}", "kept": 1}]}})
    hostile = replace(
        facts, name=HOSTILE, base=f"{HOSTILE}/x\ny", adapters=((adapter, 1.0), (adapter, 2.0)), layout=HOSTILE,
        dtype=HOSTILE, changed=HOSTILE, verification=(HOSTILE,),
    )  # fmt: skip
    whole, data, text = card_of(tmp_path / "out", hostile)
    assert data.keys() == {"library_name", "pipeline_tag", "tags", "license"}
    assert "\u202e" not in whole and "\n---\n# c" not in text
    # Outside code spans no part of the names appears.
    rest = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)
    for piece in ("[x]", "<b>", "{{z}}", "# c"):
        assert piece not in rest
        assert piece in text


@pytest.mark.parametrize("text", ["a", "`", "``a`", "a`b``c```", "", "\n", "a\nb\tc", "\x1b[31m"])
def test_code_span_ends_at_its_own_fence(text: str) -> None:
    span = code(text)
    fence = re.match("`+", span)[0]  # type: ignore[index]
    inside = span[len(fence) : -len(fence)]
    assert span.endswith(fence) and inside and inside.isprintable()
    assert len(fence) not in {len(run) for run in re.findall("`+", inside)}
    assert inside.strip() == "".join(char if char.isprintable() else " " for char in text).strip()


# ----------------------------------------------------------------------------------------------------------- serving


@pytest.mark.parametrize("layout", ["qwen", "qwen2"])
def test_commands_of_the_card(tmp_path: Path, facts: CardFacts, layout: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "vocab.json").write_text("{}")
    whole, _, _ = card_of(tmp_path / "out", replace(facts, layout=layout))
    [commands] = re.findall(r"```bash\n(.*?)```", whole, re.DOTALL)
    published = published_commands(tmp_path / "out", {"model_type": layout})
    assert commands.splitlines() == [line for lines in published.values() for line in lines]


def test_unsupported_family_has_no_scripts_ask_command(tmp_path: Path, facts: CardFacts) -> None:
    whole, data, _ = card_of(tmp_path / "out", replace(facts, layout="llama", model_type="llama"))
    assert "```bash" not in whole and "```python" in whole and data["tags"] == ["lora-merged"]


def test_later_families_need_no_remote_code(tmp_path: Path, facts: CardFacts) -> None:
    whole, data, _ = card_of(tmp_path / "out", replace(facts, layout="qwen3", model_type="qwen3"))
    assert "trust" not in whole and "custom_code" not in data["tags"] and "Apache" not in whole


def test_python_snippet_compiles(tmp_path: Path, facts: CardFacts) -> None:
    _, _, text = card_of(tmp_path / "out", facts)
    [snippet] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(snippet, "snippet", "exec")
    assert snippet.count("trust_remote_code=True") == 2


def test_difference_from_the_training_is_said(tmp_path: Path, facts: CardFacts) -> None:
    _, _, text = card_of(tmp_path / "out", facts)
    assert "what was trained" not in text
    line = "tuned was trained beside weights quantised as NF4 (weights differ by 9.1%)"
    _, _, text = card_of(tmp_path / "out", replace(facts, differences=(line,)))
    assert f"- **not what was trained**: `{line}`\n" in text
