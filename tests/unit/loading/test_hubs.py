"""A hub id is looked up in the local cache before the network; errors say how to get the model."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from errors import ConfigError
from export.inputs import find_base
from loading.checkpoint import load_checkpoint
from loading.config_files import find_local_folder
from loading.hubs import find_folder
from tests.commands import run
from tests.models import TINY

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache(folder: Path, name: str) -> Path:
    """Write a model as the hub's library caches it; return its snapshot folder."""
    model = folder / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / COMMIT
    shutil.copytree(TINY, snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_cached_model_needs_no_network(tmp_path: Path) -> None:
    snapshot = cache(tmp_path, "Qwen/Tiny")
    assert snapshot_download("Qwen/Tiny", cache_dir=tmp_path, local_files_only=True) == str(snapshot)
    assert find_folder("Qwen/Tiny", str(tmp_path)) == snapshot
    checkpoint = load_checkpoint("Qwen/Tiny", str(tmp_path))
    assert (checkpoint.name, checkpoint.folder) == ("Qwen/Tiny", snapshot)


def test_base_of_an_adapter_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that was trained on a hub id names that id."""
    snapshot = cache(tmp_path, "Qwen/Tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_base(None, tmp_path / "adapter", {"base_model_name_or_path": "Qwen/Tiny"}) == snapshot
    for name in ("Qwen/Other", "not a/hub:id", "../none"):
        with pytest.raises(
            ConfigError, match=r"which is not a model folder on this machine\. Give the base's folder with --base DIR"
        ):
            find_base(None, tmp_path / "adapter", {"base_model_name_or_path": name})


def refuses(name: str, cache_dir: Path, message: str, hub: str = "hf") -> None:
    with pytest.raises(ConfigError) as caught:
        find_folder(name, str(cache_dir), hub)
    assert str(caught.value) == f"--model_name_or_path {name}: {message}"


def test_unknown_model(tmp_path: Path) -> None:
    refuses(
        "Qwen/Tiny", tmp_path, "no such folder, not in the local cache, and the hub cannot be reached. "
        "Check the name, or download it on a machine with network access: hf download Qwen/Tiny",
    )  # fmt: skip


def test_incomplete_download(tmp_path: Path) -> None:
    snapshot = cache(tmp_path, "Qwen/Tiny")
    (snapshot / "model.safetensors").unlink()
    refuses(
        "Qwen/Tiny", tmp_path, f"incomplete in the local cache ({snapshot} holds no weights (model.safetensors "
        "or pytorch_model.bin, one file or shards with an index)), and the hub cannot be reached. "
        "Check the name, or download it on a machine with network access: hf download Qwen/Tiny",
    )  # fmt: skip


def test_invalid_name(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^--model_name_or_path not a/hub:id: no such folder, .* this is not a valid model name"
    ):
        find_folder("not a/hub:id", str(tmp_path))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RepositoryNotFoundError, "the hub has no model of this name, or it is private"),
        (GatedRepoError, "the hub requires accepting its terms and a token (hf auth login)"),
        (ConnectionResetError, "the download failed (reset)"),
    ],
)
def test_reasons_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], reason: str
) -> None:
    """The network is not used: the errors of the library are raised directly."""

    def fails(*args: object, **kwargs: object) -> str:
        instance = error.__new__(error)
        instance.args = ("reset",)
        raise instance

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    refuses(
        "Qwen/Tiny", tmp_path, f"no such folder, not in the local cache, and {reason}. "
        "Check the name, or download it on a machine with network access: hf download Qwen/Tiny",
    )  # fmt: skip


def test_unreachable_hub_is_reported_within_a_minute(tmp_path: Path) -> None:
    """Not in offline mode: an unused local port simulates a machine without a network."""
    code = (
        "import os; os.environ |= {'HF_HUB_OFFLINE': '0', 'HF_ENDPOINT': 'http://127.0.0.1:9'}\n"
        "from errors import ConfigError\nfrom loading.hubs import find_folder\n"
        f"try: find_folder('Qwen/Tiny', {str(tmp_path)!r})\nexcept ConfigError as error: print(error)"
    )
    start = time.monotonic()
    result = run("-c", code, is_new=True)
    assert "and the hub cannot be reached. Check the name" in result.stdout, result.stderr
    assert time.monotonic() - start < 60


# ---------------------------------------------------------------------------------------------------------- ModelScope

MODELSCOPE = """
import os, shutil
def snapshot_download(model_id, cache_dir=None, **kwargs):
    folder = os.path.join(cache_dir, *model_id.split("/"))
    if not os.path.isdir(folder):
        if model_id != "qwen/Tiny":
            raise RuntimeError(f"Not Found\\nfor url: {model_id}")
        shutil.copytree(SOURCE, folder)
        print("downloaded")
    return folder
"""


@pytest.fixture
def modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake of the library with the arguments that are used."""
    package = tmp_path / "site"
    package.mkdir()
    (package / "modelscope.py").write_text(MODELSCOPE.replace("SOURCE", repr(str(TINY))))
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.delitem(__import__("sys").modules, "modelscope", raising=False)


def test_model_from_modelscope(tmp_path: Path, modelscope: None, capsys: pytest.CaptureFixture[str]) -> None:
    for downloads in ("downloaded\n", ""):
        folder = find_folder("qwen/Tiny", str(tmp_path / "cache"), "modelscope")
        assert folder == tmp_path / "cache" / "qwen" / "Tiny"
        assert capsys.readouterr().out == downloads
    assert load_checkpoint("qwen/Tiny", str(tmp_path / "cache"), "modelscope").folder == folder
    assert find_folder(str(TINY), None, "modelscope") == TINY


@pytest.mark.parametrize(
    "place",
    [
        "models/Qwen--Qwen2.5-Tiny/snapshots/master",
        "models/Qwen--Qwen2.5-Tiny/snapshots/v1.0",
        "models/Qwen/Qwen2___5-Tiny",
        "hub/models/Qwen/Qwen2___5-Tiny",
        "hub/Qwen/Qwen2___5-Tiny",
    ],
)
def test_every_command_finds_what_modelscope_has_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """By its id and without a flag, in the layouts of several versions of the library."""
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    name, folder = "Qwen/Qwen2.5-Tiny", tmp_path / place
    shutil.copytree(TINY, folder)
    assert find_folder(name) == find_folder(name, hub="modelscope") == folder
    assert find_local_folder(name) == find_local_folder(name, hub="modelscope") == folder
    assert find_base(None, tmp_path / "adapter", {"base_model_name_or_path": name}) == folder


def test_unknown_model_on_modelscope(tmp_path: Path, modelscope: None) -> None:
    refuses(
        "qwen/none", tmp_path, "not in modelscope's local cache, and the download failed (Not Found for url: "
        "qwen/none). Check the name, or download it on a machine with network access: modelscope download --model "
        "qwen/none", "modelscope",
    )  # fmt: skip


def test_modelscope_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "modelscope", None)
    with pytest.raises(
        ConfigError, match=r"^--model_hub modelscope: its library is not installed\. .* -m pip install modelscope$"
    ):
        find_folder("qwen/Tiny", str(tmp_path), "modelscope")
