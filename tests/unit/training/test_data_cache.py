"""Prepared data is used again only for the same inputs, intact, and by everyone who needs it."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import outputs
from chat.families import ANSWER_STYLES, Family
from data_utils.dataset import DataOptions, DataReader
from data_utils.encode import EncodeOptions, Encoder
from data_utils.examples import ExampleSet
from data_utils.prepared import load_examples
from data_utils.sources import parse_source
from errors import ConfigError, DataError
from loading.checkpoint import Checkpoint, load_checkpoint
from ownership import make_temporary_folder
from scripts.data_cache import main as data_cache
from tests.golden import REPO
from tests.models import CONVERSATIONS, copy_checkpoint
from training import cache_entries
from training import data_cache as data_cache_module
from training.cache_entries import ABOUT, find_entries
from training.checks import check_args
from training.config.parsing import parse_args
from training.data import load_data
from training.data_cache import find_or_prepare, fingerprint, ingredients


class Case:
    """Inputs of a run; a test changes one of them."""

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self.folder, self.cache, self.checkpoint = folder, folder / "cache", checkpoint
        self.data = folder / "train.jsonl"
        records = [{"conversations": [{"from": f, "value": v} for f, v in turns]} for turns in CONVERSATIONS]
        records[2]["conversations"][1]["weight"] = 0.5  # type: ignore[assignment]
        records += [{"conversations": [{"from": "user", "value": "no answer"}]}, records[0]]
        self.data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        self.family: Family = checkpoint.family
        self.encoding, self.max_samples = EncodeOptions(max_length=64), 2
        self.options = DataOptions(skip_bad=True, fill={"name": "Linden"})
        self.sources = {"train": [str(self.data)]}

    def reader(self, **settings: Any) -> DataReader:
        encoder = Encoder(self.checkpoint.tokenizer, self.family, self.encoding)
        sources = {name: [parse_source(source) for source in of_set] for name, of_set in self.sources.items()}
        reader = DataReader(sources, encoder, self.options, max_samples=self.max_samples, show_progress=False)
        reader.settings = dataclasses.replace(reader.settings, **settings)
        return reader

    def key(self) -> str:
        return fingerprint(ingredients(self.reader(), self.checkpoint))

    def load(self, **settings: Any) -> ExampleSet:
        prepared = find_or_prepare(self.cache, self.reader(**settings), self.checkpoint)
        prepared.release()
        return prepared.sets["train"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(str(copy_checkpoint(tmp_path_factory.mktemp("model") / "tiny")))


@pytest.fixture
def case(tmp_path: Path, checkpoint: Checkpoint) -> Case:
    return Case(tmp_path, checkpoint)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The folders in which data is prepared."""
    folders: list[Path] = []
    real = data_cache_module.prepare

    def prepare(reader: DataReader, folder: Path) -> None:
        folders.append(folder)
        real(reader, folder)

    monkeypatch.setattr(data_cache_module, "prepare", prepare)
    yield folders


# ------------------------------------------------------------------------------------------------- what is compared


def _replace(name: str, **values: Any) -> Callable[[Case], None]:
    return lambda case: setattr(case, name, dataclasses.replace(getattr(case, name), **values))


def _change_byte(case: Case) -> None:
    """Change the data, but neither its size nor its time."""
    before = case.data.stat()
    case.data.write_bytes(case.data.read_bytes().replace(b"Hello!", b"Hallo!"))
    os.utime(case.data, ns=(before.st_atime_ns, before.st_mtime_ns))


def _move(case: Case) -> None:
    moved = case.data.rename(case.folder / "moved.jsonl")
    case.sources = {"train": [str(moved)]}


def _other_folder(case: Case, file: str, text: str) -> None:
    folder = case.folder / "model"
    shutil.copytree(case.checkpoint.folder, folder)
    (folder / file).write_bytes((folder / file).read_bytes() + text.encode())
    case.checkpoint = dataclasses.replace(case.checkpoint, folder=folder)


OTHER_ENCODING = {
    "max_length": 63, "system_message": "Be brief.", "label_mask": "last", "truncation": "cut", "needs_answer": False,
    "allow_special_tokens": ("<|extra_0|>",), "thinking": "auto", "split_turns": "auto",
}  # fmt: skip
OTHER_OPTIONS = {
    "data_format": "conversations", "fill": {"name": "Elm"}, "skip_bad": False, "eval_share": 0.1, "seed": 43,
}  # fmt: skip
CHANGES: dict[str, Callable[[Case], None]] = {
    "bytes of the data": _change_byte,
    "path of the data": _move,
    "drawn records": lambda case: case.sources.update(train=[f"{case.data}#5"]),
    "copies": lambda case: case.sources.update(train=[f"{case.data}@x2"]),
    "another source": lambda case: case.sources.update(train=[str(case.data)] * 2),
    "another set": lambda case: case.sources.update(eval=[str(case.data)]),
    "vocabulary": lambda case: _other_folder(case, "qwen.tiktoken", "\n"),
    "tokenizer's settings": lambda case: _other_folder(case, "tokenizer_config.json", " "),
    "family": lambda case: setattr(case, "family", ANSWER_STYLES[0]),
    "tool form": _replace("family", tool_form=None),
    "samples": lambda case: setattr(case, "max_samples", 3),
    **{f"encoding: {name}": _replace("encoding", **{name: value}) for name, value in OTHER_ENCODING.items()},
    **{f"options: {name}": _replace("options", **{name: value}) for name, value in OTHER_OPTIONS.items()},
}
DRAWS: dict[str, Callable[[Case], None]] = {
    "drawn records": CHANGES["drawn records"],
    "a share of the records": lambda case: case.sources.update(train=[f"{case.data}@x1.5"]),
    "drawn evaluation": lambda case: case.sources.update(eval=[f"{case.data}#2"]),
    "held out": _replace("options", eval_share=0.1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_ingredient_changes_the_fingerprint(case: Case, change: str) -> None:
    if change == "options: seed":
        DRAWS["drawn records"](case)
    before = case.key()
    assert case.key() == before
    CHANGES[change](case)
    assert case.key() != before


@pytest.mark.parametrize("change", DRAWS)
def test_seed_is_compared_where_it_draws(case: Case, change: str) -> None:
    case.sources.update(train=[f"{case.data}@x2"])
    before = case.key()
    CHANGES["options: seed"](case)
    assert case.key() == before
    DRAWS[change](case)
    before = case.key()
    case.options = dataclasses.replace(case.options, seed=44)
    assert case.key() != before


def test_all_options_are_compared() -> None:
    """A new option needs a change above."""
    for group, others in ((EncodeOptions, OTHER_ENCODING), (DataOptions, OTHER_OPTIONS)):
        assert {field.name for field in dataclasses.fields(group)} == others.keys()


@pytest.mark.parametrize("file", ["chat/render.py", "data_utils/encode.py", "data_utils/report/samples.py"])
def test_changed_code_changes_the_fingerprint(
    case: Case, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("chat", "data_utils"):
        shutil.copytree(REPO / name, tmp_path / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(data_cache_module, "ROOT", tmp_path / "code")
    before = case.key()
    with (tmp_path / "code" / file).open("a") as code:
        code.write("\n")
    assert case.key() != before


@pytest.mark.parametrize("library", ["tokenizers", "tiktoken", "transformers"])
def test_another_version_of_a_library_changes_the_fingerprint(
    case: Case, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, version = case.key(), importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == library else version(name))
    assert case.key() != before


# ------------------------------------------------------------------------------------------------- what is served


def test_entry_gives_the_same_examples_report_and_messages(
    case: Case, prepared: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        fresh, told = load_examples(case.reader())["train"], caplog.messages[:]
        caplog.clear()
        case.load()
        caplog.clear()
        again = case.load(batch_size=7)
    assert len(prepared) == 1
    assert any(message.startswith("Skipped: ") for message in told)
    assert [message for message in caplog.messages if "was prepared before" not in message] == told
    assert list(again) == list(fresh)
    assert again.digest() == fresh.digest()
    assert [again.where(index) for index in range(len(again))] == [fresh.where(index) for index in range(len(fresh))]
    fresh.report.settings = dataclasses.replace(fresh.report.settings, batch_size=7)
    assert again.report.as_dict() == fresh.report.as_dict()
    assert again.report.samples == fresh.report.samples
    assert len(again.report.samples) == 2
    assert again.report.total() == fresh.report.total()


def test_set_without_examples_is_refused_from_the_cache_too(case: Case, prepared: list[Path]) -> None:
    case.encoding = EncodeOptions(max_length=3)
    errors = []
    for _ in range(2):
        with pytest.raises(DataError, match="nothing is left to train on") as caught:
            case.load()
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert len(prepared) == 1


def test_faults_leave_no_entry(case: Case) -> None:
    case.options = DataOptions()
    for _ in range(2):
        with pytest.raises(DataError, match="no assistant turn"):
            case.load()
    assert list(case.cache.iterdir()) == []


def test_file_that_changes_while_it_is_read_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    real = data_cache_module.prepare

    def prepare(reader: DataReader, folder: Path) -> None:
        real(reader, folder)
        _change_byte(case)

    monkeypatch.setattr(data_cache_module, "prepare", prepare)
    with pytest.raises(DataError, match="a file changed while it was read"):
        case.load()
    assert list(case.cache.iterdir()) == []


def _files(case: Case) -> list[Path]:
    [entry] = case.cache.iterdir()
    return sorted(path for path in entry.rglob("*") if path.is_file() and path.name != ABOUT)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_flip, lambda path: os.truncate(path, path.stat().st_size - 1), Path.unlink])
def test_damaged_files_are_found_and_made_anew(
    case: Case, damage: Callable[[Path], None], prepared: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    expected = list(case.load())
    assert len(_files(case)) > 5
    for number, path in enumerate(_files(case), 2):
        caplog.clear()
        damage(path)
        assert list(case.load()) == expected, path
        assert len(prepared) == number, path
        [warning] = [message for message in caplog.messages if message.startswith("Prepared data is damaged")]
        assert str(path) in warning


# ------------------------------------------------------------------------------------------------- several runs


def test_two_runs_prepare_once(case: Case, prepared: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    counting = data_cache_module.prepare

    def prepare(reader: DataReader, folder: Path) -> None:
        time.sleep(0.5)
        counting(reader, folder)

    monkeypatch.setattr(data_cache_module, "prepare", prepare)
    results: list[ExampleSet] = []
    threads = [threading.Thread(target=lambda: results.append(case.load())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(prepared) == 1
    assert [list(result) for result in results] == [list(results[0])] * 3
    assert len(list(case.cache.iterdir())) == 1


def test_dead_preparer_is_noticed(case: Case) -> None:
    case.cache.mkdir()
    partial = case.cache / f"{case.key()}.partial"
    if (child := os.fork()) == 0:
        folder = make_temporary_folder(partial, "test")
        (folder.path / "half").write_text("half")
        os._exit(9)
    os.waitpid(child, 0)
    assert (partial / "half").exists()
    assert len(case.load()) == len(CONVERSATIONS) + 1
    assert [path.name for path in case.cache.iterdir()] == [case.key()]


def test_entries_are_listed_and_removed(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    case.load()
    old = case.cache / case.key()
    os.utime(old / ABOUT, (time.time() - 40 * 86400,) * 2)
    case.sources = {"train": [f"{case.data}@x2"]}
    used = find_or_prepare(case.cache, case.reader(), case.checkpoint)
    (case.cache / "mine").mkdir()
    assert [entry.path.name for entry in find_entries(case.cache)] == [case.key(), old.name]
    data_cache(["--data_cache_dir", str(case.cache)])
    assert f"train: {case.data}@x2" in capsys.readouterr().out
    data_cache(["--data_cache_dir", str(case.cache), "--remove_unused", "30"])
    assert sorted(path.name for path in case.cache.iterdir()) == sorted([case.key(), "mine"])
    data_cache(["--data_cache_dir", str(case.cache), "--remove", case.key()[:6]])
    assert "is in use" in capsys.readouterr().out
    used.release()
    data_cache(["--data_cache_dir", str(case.cache), "--remove", case.key()[:6]])
    assert [path.name for path in case.cache.iterdir()] == ["mine"]


@pytest.mark.parametrize("days", ["-1", "nan"])
def test_wrong_ages_and_folders_remove_nothing(case: Case, days: str) -> None:
    case.load()
    with pytest.raises(ConfigError, match="out of range"):
        data_cache(["--data_cache_dir", str(case.cache), "--remove_unused", days])
    with pytest.raises(ConfigError, match="no such folder"):
        data_cache(["--data_cache_dir", str(case.folder / "other")])
    assert len(find_entries(case.cache)) == 1


def test_full_disk_in_the_default_folder_does_not_end_a_run(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fill(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data_cache_module, "prepare", fill)
    monkeypatch.setenv("XDG_CACHE_HOME", str(case.folder))
    monkeypatch.chdir(case.folder)
    argv = ["--model_name_or_path", str(case.checkpoint.folder), "--data_path", str(case.data), "--output_dir", "out"]
    argv += ["--on_bad_record", "skip"]
    args = parse_args(argv)
    assert len(load_data(args, args.trainer_values(), case.checkpoint)["train"]) == len(CONVERSATIONS) + 1  # type: ignore[arg-type]
    assert any(message.startswith("Prepared data is not kept: ") for message in caplog.messages)
    args = parse_args([*argv, "--data_cache_dir", "given"])
    with pytest.raises(OSError, match="set --data_cache_dir to use another folder"):
        load_data(args, args.trainer_values(), case.checkpoint)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_entries_never_replace_what_is_not_theirs(case: Case, prepared: list[Path], kind: str) -> None:
    entry, elsewhere = case.cache / case.key(), case.folder / "elsewhere"
    case.cache.mkdir()
    if kind == "file":
        entry.write_text("mine")
    else:
        folder = elsewhere if kind == "link" else entry
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
        if kind == "link":
            entry.symlink_to(folder)
    with pytest.raises(ConfigError, match=f"{entry.name} is no entry of the cache"):
        case.load()
    assert not prepared, "it is found before the work"
    assert (entry if kind == "file" else entry / "mine.txt").read_text() == "mine"


def test_read_only_folder_serves_its_entries(case: Case, prepared: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    check = outputs.check_writable

    def refuse(folder: Path, label: str) -> None:
        if folder == case.cache:
            raise ConfigError(f"{label}: {folder} is not writable", "Choose a writable folder")
        check(folder, label)

    argv = ["--model_name_or_path", str(case.checkpoint.folder), "--data_path", str(case.data)]
    argv += ["--output_dir", str(case.folder / "out"), "--data_cache_dir", str(case.cache)]
    monkeypatch.setattr(outputs, "check_writable", refuse)
    monkeypatch.setattr(data_cache_module, "check_writable", refuse)
    with pytest.raises(ConfigError, match="is not writable"):
        check_args(parse_args(argv))
    monkeypatch.undo()
    case.load()
    monkeypatch.setattr(outputs, "check_writable", refuse)
    monkeypatch.setattr(data_cache_module, "check_writable", refuse)
    check_args(parse_args(argv))
    assert cache_entries.usable_folder(parse_args(argv).data) == case.cache
    assert len(case.load()) > 0
    case.max_samples = 9
    with pytest.raises(ConfigError, match=r"has no entry for this data: .* is not writable"):
        case.load()


def test_damaged_descriptions_are_listed_and_removed(case: Case) -> None:
    case.load()
    (case.cache / case.key() / "about.json").write_text("{")
    [entry] = cache_entries.find_entries(case.cache)
    assert entry.sources == ["damaged"]
    entry.remove()
    assert not cache_entries.find_entries(case.cache)


@pytest.mark.parametrize("flag", ["--data_path", "--eval_data_path"])
def test_a_cache_that_would_be_read_as_data_is_refused(case: Case, flag: str) -> None:
    folder = case.folder / "data"
    folder.mkdir()
    case.data.rename(folder / case.data.name)
    argv = ["--model_name_or_path", str(case.checkpoint.folder), "--data_path", str(folder / case.data.name)]
    argv += ["--output_dir", str(case.folder / "out"), flag, f"{folder}@x2"]
    cache = folder / "more" / "cache"
    with pytest.raises(ConfigError) as caught:
        check_args(parse_args([*argv, "--data_cache_dir", str(cache)]))
    what = f"--data_cache_dir {cache} is inside {flag} {folder}@x2, where it would be read as data"
    assert what in str(caught.value)
    check_args(parse_args([*argv, "--data_cache_dir", str(folder / ".cache")]))  # hidden folders are not read
    check_args(parse_args([*argv, "--data_cache_dir", str(cache), "--no_data_cache"]))
    assert not cache.exists()


def test_a_default_cache_that_would_be_read_as_data_is_not_used(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(case.folder))
    assert cache_entries.usable_folder(parse_args(["--data_path", str(case.folder)]).data) is None
    assert any("Prepared data is not kept: " in message for message in caplog.messages)
