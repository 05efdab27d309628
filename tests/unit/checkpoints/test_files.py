"""Single files: JSON objects, and files written in one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints.files import load_json, load_json_or_empty, save_text, staged_file
from errors import ConfigError


def test_invalid_json_is_refused_by_file_name(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json: No such file"):
        load_json(path)
    path.write_text('{"a": 1,}')
    with pytest.raises(ConfigError, match=r"config\.json is not JSON: .*line 1 column 9"):
        load_json(path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json holds a list, not a JSON object"):
        load_json(path)


def test_lenient_loader_returns_an_empty_object(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert load_json_or_empty(path) == {}
    for text, expected in (('{"a": 1,}', {}), ("[1]", {}), ("\xff", {}), ('{"a": 1}', {"a": 1})):
        path.write_bytes(text.encode("latin-1"))
        assert load_json_or_empty(path) == expected


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_write_leaves_the_previous_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "notes.txt"
    save_text("first", path)
    with pytest.raises(error), staged_file(path) as staging:
        staging.write_text("half")
        raise error
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"] and path.read_text() == "first"
    (tmp_path / ".notes.txt.partial").write_text("left by a killed process")
    save_text("second", path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"] and path.read_text() == "second"
