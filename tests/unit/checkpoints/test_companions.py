"""Files beside the weights: read from their folder, never from where a link leads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoints.companions import copy_companion, find_companion, find_licenses
from checkpoints.input_folders import check_files
from errors import ConfigError
from tests.commands import names_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a licence, and a secret outside of it."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "LICENSE").write_text("terms")
    (tmp_path / "secret").write_text("secret")
    return folder


@pytest.mark.parametrize("name", ["NOTICE", "License.md", "README.md", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("chain", [False, True])
def test_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str, chain: bool) -> None:
    if chain:
        (folder / "inner").symlink_to("../secret")
    (folder / name).symlink_to("inner" if chain else tmp_path / "secret")
    message = rf"{name} leads out of its folder, to {tmp_path / 'secret'}\. Put a copy"
    for call in (lambda: check_files(folder), lambda: copy_companion(name, [folder], tmp_path)):
        with pytest.raises(ConfigError, match=message):
            call()
    assert names_in(tmp_path) == ["base", "secret"]


def test_link_through_another_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("..", "../secret", "../config.json"):
        if (folder / name).is_file():
            with pytest.raises(ConfigError, match="leads out of its folder"):
                find_companion(folder, name)


def test_links_within_the_folder_and_of_a_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "NOTICE").symlink_to("LICENSE")
    (tmp_path / "link").symlink_to(folder)
    assert find_licenses(tmp_path / "link") == ["LICENSE", "NOTICE"]
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0a1b"
    (snapshot / "sub").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "c2d3").write_text("terms")
    (snapshot / "LICENSE").symlink_to("../../blobs/c2d3")
    (snapshot / "sub" / "LICENSE").symlink_to("../../../blobs/c2d3")
    local = tmp_path / "local-dir"
    local.mkdir()
    (local / "LICENSE").symlink_to(repository / "blobs" / "c2d3")
    for each in (snapshot, snapshot / "sub", local):
        copy_companion("LICENSE", [each], tmp_path)
        assert (tmp_path / "LICENSE").read_text() == "terms"


def test_folders_that_look_like_a_cache_lead_nowhere_else(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "evil" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "evil" / "blobs").symlink_to(tmp_path)
    (snapshot / "LICENSE").symlink_to("../../blobs/secret")
    with pytest.raises(ConfigError, match="leads out"):
        find_licenses(snapshot)


def test_what_is_no_file_is_no_companion(folder: Path) -> None:
    os.mkfifo(folder / "NOTICE")
    (folder / "tokenizer.json").mkdir()
    (folder / "README.md").symlink_to("absent")
    assert find_licenses(folder) == ["LICENSE"]
    assert [find_companion(folder, name) for name in ("NOTICE", "tokenizer.json", "README.md", "absent")] == [None] * 4
