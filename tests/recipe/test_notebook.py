"""The notebook's cells run in order on the CPU, and the merged model gives the trained answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server
from tests.golden import REPO

NOTEBOOK = REPO / "examples" / "tune_merge_chat.ipynb"


@pytest.mark.long
def test_cells_run_and_the_model_gives_the_trained_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    fork_server.link_checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("sys.executable", fork_server.python())
    names: dict[str, Any] = {}
    for cell in cells:
        exec(compile(cell, str(NOTEBOOK), "exec"), names)
    [asked] = [turn["value"] for turn in names["conversations"][0]["conversations"] if turn["from"] == "assistant"]
    assert names["answer"] == asked
    assert (tmp_path / "output" / "notebook" / "merged" / "config.json").exists()
