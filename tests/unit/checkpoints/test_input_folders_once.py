"""A large JSON file of an input folder is checked once, and again when it has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import input_folders
from errors import ConfigError


def test_a_vocabulary_is_parsed_once_per_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    load = input_folders.load_json

    def record(path: Path) -> Any:
        parsed.append(path.name)
        return load(path)

    monkeypatch.setattr(input_folders, "load_json", record)
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps({f"token{number}": number for number in range(100_000)}))
    (tmp_path / "config.json").write_text("{}")
    for _ in range(2):
        input_folders.check_files(tmp_path)
    assert sorted(parsed) == ["config.json", "config.json", "vocab.json"]
    vocabulary.write_text("[" + vocabulary.read_text()[1:-1].replace(": ", ", ") + "]")
    with pytest.raises(ConfigError, match=r"vocab\.json holds a list, not a JSON object"):
        input_folders.check_files(tmp_path)
