"""Everything that may be named as data and is no data file: one line, in every command that reads data."""

from __future__ import annotations

import gzip
import os
import pickle
import socket
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import feather

import finetune
from data_utils.files import data_files, read_records
from data_utils.sources import parse_source
from errors import ConfigError, DataError
from scripts import convert_data, preview_data
from tests.commands import run_here
from tests.models import TINY

RECORD = b'{"prompt": "a", "response": "b"}\n'


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))
    return path


def _loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


def _dangling(path: Path) -> Path:
    path.symlink_to(path.with_name("gone"))
    return path


def _with(content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


def _xlsx(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml", "<x/>")
    return path


def _arrow(path: Path) -> Path:
    feather.write_feather(pa.table({"a": [1]}), path)
    return path


def _folder_with(make: Callable[[Path], Path], name: str) -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        path.mkdir()
        (path / "good.jsonl").write_bytes(RECORD)
        make(path / name)
        return path

    return build


def _folder_of_arrow(path: Path) -> Path:
    path.mkdir()
    (path / "dataset_info.json").write_text("{}")
    return _arrow(path / "data-00000-of-00001.arrow").parent


# Name of the file, how it is made, and the words of the message. The file's name ends in the kind's name.
KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pipe.jsonl": (_fifo, "is a pipe, not a file, and data is read twice. Write the data to a file first (COMMAND > "),
    "socket.jsonl": (_socket, "is a socket, not a file"),
    "loop.jsonl": (_loop, "cannot be read (Too many levels of symbolic links)"),
    "dangling.jsonl": (_dangling, ""),
    "n" * 300: (lambda path: path, "cannot be read (File name too long)"),
    "table.csv": (
        _with(b"prompt,response\na,b\n"),
        "is a CSV table, not JSON. Convert it with pandas: read_csv('table",
    ),
    "quoted.csv": (_with(b'"prompt","response"\n"a","b"\n'), "is a CSV table, not JSON"),
    "table.tsv": (
        _with(b"prompt\tresponse\n"),
        "is a table, not JSON. Convert it with pandas: read_csv('table.tsv', sep=",
    ),
    "table.xlsx": (_xlsx, "is a zip archive or an Excel table. Unpack it, or save the table as CSV"),
    "text.md": (_with(b"User: Hi\n"), "is plain text, not JSON. Name it .txt to train on it as plain text"),
    "data.pkl": (_with(pickle.dumps([1])), "is a pickle, which can run code when it is opened. Save the data as JSON"),
    "data.arrow": (_arrow, "is an Arrow file of the datasets library. Write it with its to_json("),
    "data.jsonl.zst": (_with(b"\x28\xb5\x2f\xfd\x00"), "is compressed with zstd. Unpack it first"),
    "data.tar.gz": (_with(gzip.compress(bytes(1024))), "is an archive. Unpack it first"),
    "data.yaml": (_with(b"a: 1\n"), "is YAML, not JSON"),
    "empty.jsonl": (_with(b""), "the file contains no conversations"),
    "folder": (lambda path: path.mkdir() or path, "the folder contains no data files"),  # type: ignore[func-returns-value]
    "table.csv.gz": (_with(gzip.compress(b"prompt,response\na,b\n")), "is a CSV table, not JSON"),
    "saved": (_folder_of_arrow, "is a data set saved by the datasets library. Write it with its to_json("),
    "folder with a pipe": (_folder_with(_fifo, "pipe.jsonl"), "is a pipe, not a file"),
    "folder with a loop": (_folder_with(_loop, "loop.jsonl"), "cannot be read (Too many levels of symbolic links)"),
    "folder with a link": (_folder_with(_dangling, "gone.jsonl"), "is a link to a file that does not exist"),
}


def _commands(path: Path, folder: Path) -> dict[str, tuple[Any, Sequence[object]]]:
    run = ("--model_name_or_path", TINY, "--disable_tqdm", "True", "--use_cpu", "True")
    good = folder / "good.jsonl"
    good.write_bytes(RECORD)
    return {
        "finetune.py": (finetune.main, [*run, "--data_path", path, "--dry_run", "--output_dir", folder / "out"]),
        "scripts.preview_data": (preview_data.main, [*run, "--data_path", good, "--eval_data_path", path]),
        "scripts.convert_data": (convert_data.main, [path, folder / "out.jsonl"]),
    }


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_data_file_is_refused_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = KINDS[name]
    path = make(tmp_path / name)
    for command, (main, arguments) in _commands(path, tmp_path).items():
        assert run_here(main, command, arguments) == 2, command
        [*_, line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"{command}: error: ") and str(path) in line and message in line, command
    if "folder" not in name and name != "saved":
        with pytest.raises(DataError):
            list(read_records(path))


def test_process_substitution_is_refused_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    reader, writer = os.pipe()  # as the shell's <(COMMAND)
    try:
        with pytest.raises(
            ConfigError, match=rf"^--data_path /dev/fd/{reader}: is a pipe, not a file, and data is read"
        ):
            parse_source(f"/dev/fd/{reader}")
        assert run_here(convert_data.main, "scripts.convert_data", [f"/dev/fd/{reader}", tmp_path / "a.jsonl"]) == 2
        assert "is a pipe, not a file" in capsys.readouterr().err
    finally:
        os.close(reader)
        os.close(writer)


def test_devices_are_refused() -> None:
    for name in ("/dev/null", "/dev/zero"):
        with pytest.raises(ConfigError, match=rf"^--data_path {name}: is a device, not a file"):
            parse_source(name)
        with pytest.raises(DataError, match=rf"^{name}: is a device, not a file"):
            data_files(name)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "a.json#" + "9" * 5000, "a.json@x" + "9" * 5000])
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^--data_path ") as error:
        parse_source(name)
    assert "\n" not in str(error.value)


def test_factor_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(RECORD)
    assert parse_source(f"{path}@x10000").factor == 10_000
    for factor in ("10001", "9" * 200):
        with pytest.raises(ConfigError, match=r"takes each record too often\. Give at most @x10000$"):
            parse_source(f"{path}@x{factor}")


def test_name_that_is_not_utf8_is_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9 \xb0\xa1.jsonl")
    path.write_bytes(RECORD)
    for command, (main, arguments) in _commands(path, tmp_path).items():
        assert run_here(main, command, arguments) == 0, (command, capfd.readouterr().err)


def test_json_is_read_whatever_the_ending(tmp_path: Path) -> None:
    for name in ("a.csv", "a.txt", "a.pkl", "a.yaml"):
        path = tmp_path / name
        path.write_bytes(RECORD)
        assert len(list(read_records(path))) == 1
