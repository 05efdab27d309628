"""Single files: JSON objects."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints.files import is_file, load_json, load_json_or_empty
from checkpoints.json_schemas import SCHEMAS, Schema
from errors import ConfigError
from tests.folder_faults import CONTENTS, FAULTS, PLACES, spoil


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


@pytest.mark.parametrize("fault", [*FAULTS])
@pytest.mark.parametrize("name", [*SCHEMAS, "other.json"])
def test_faulty_file_is_refused_by_name(tmp_path: Path, name: str, fault: str) -> None:
    path = tmp_path / name
    spoil(path, fault)
    if fault in ("NaN", "infinite") and SCHEMAS.get(name, Schema()).has_nan:
        return
    with pytest.raises(ConfigError) as caught:
        load_json(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert load_json_or_empty(path) == {}
    if fault in PLACES:
        with pytest.raises(ConfigError):
            is_file(path)


def test_file_that_cannot_be_named(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b"):
        assert not is_file(tmp_path / name)
        with pytest.raises(ConfigError, match="cannot read"):
            load_json(tmp_path / name)


def test_file_larger_than_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{" + " " * 100 + "}")
    with pytest.raises(ConfigError, match=r"config\.json is larger than 50 bytes"):
        load_json(path, Schema(most_bytes=50))
    with path.open("wb") as file:
        file.truncate(10**12)  # takes no space on the disk
    with pytest.raises(ConfigError, match=r"config\.json is larger than 67,108,864 bytes"):
        load_json(path)


def test_equal_values_of_one_key_and_surrogate_pairs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1, "a": 1, "b": "\\ud83d\\ude00"}')
    assert load_json(path) == {"a": 1, "b": "\N{GRINNING FACE}"}
    assert "two values of a key" in CONTENTS and "half a surrogate pair" in CONTENTS
