"""Every file of a checkpoint, damaged in every way: one line that names it and exit code 2, or no effect at all."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
from tests.commands import PLAIN, finetune_here, names_in, run_here
from tests.models import TINY, change_json, write_conversations
from training.config.parsing import parse_args
from training.run_folder.manifest import load_manifest, write_manifest
from training.run_folder.names import MANIFEST
from training.run_folder.start import find_start

FILES = [
    "adapter_config.json", "adapter_model.safetensors", "generation_config.json", MANIFEST, "optimizer.pt",
    "qwen.tiktoken", "rng_state.pth", "scheduler.pt", "tokenizer_config.json", "trainer_state.json",
]  # fmt: skip
READ = ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"]


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile()))


def replace_by_torch_pickle(path: Path) -> None:
    torch.save({"state": {}, "param_groups": [], "x": Hostile()}, path)


def replace_by_list(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text("[1, 2]")
    elif path.suffix == ".safetensors":
        save_file({"x": torch.zeros(2)}, path)
    else:
        torch.save([1, 2], path)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


TAMPERINGS = [
    remove, empty, truncate, replace_by_pickle, replace_by_torch_pickle, replace_by_list, replace_by_pipe,
    replace_by_folder, replace_by_link,
]  # fmt: skip


def arguments(folder: Path, *flags: object) -> list[str]:
    words = [
        *PLAIN,
        "--model_name_or_path", TINY, "--data_path", folder / "train.json", "--output_dir", folder / "new",
        "--use_lora", "--lora_r", 2, "--max_steps", 2, "--per_device_train_batch_size", 2, "--logging_steps", 1,
        "--save_strategy", "steps", "--save_steps", 1, "--use_cpu", "True", "--disable_tqdm", "True", *flags,
    ]  # fmt: skip
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_conversations(folder / "train.json")
    finetune_here(*arguments(folder))
    assert names_in(folder / "new" / "checkpoint-1") == sorted(FILES)
    return folder


@contextmanager
def signed_again(checkpoint: Path) -> Iterator[None]:
    """Write the manifest again after the block, as who changes a file can do."""
    manifest = load_manifest(checkpoint)
    (checkpoint / MANIFEST).unlink()
    yield
    facts = {name: manifest[name] for name in manifest if name not in ("format", "step", "written", "files")}
    write_manifest(checkpoint, manifest["step"], facts)


def copy_checkpoint(run: Path, folder: Path) -> Path:
    shutil.copyfile(run / "train.json", folder / "train.json")
    return Path(shutil.copytree(run / "new" / "checkpoint-1", folder / "checkpoint-1"))


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_differs_from_the_manifest_is_refused(
    run: Path, tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    for number, tamper in enumerate(TAMPERINGS):
        folder = tmp_path / str(number)
        folder.mkdir()
        checkpoint = copy_checkpoint(run, folder)
        facts = load_manifest(checkpoint)
        tamper(checkpoint / file)
        args = parse_args(arguments(folder, "--resume_from_checkpoint", checkpoint))
        if file == MANIFEST and tamper is remove:
            find_start(args, facts)
            assert "has no manifest.json to check that it is intact" in caplog.text
            continue
        with pytest.raises(ValueError) as caught:
            find_start(args, facts)
        assert file in str(caught.value) or "there is no checkpoint" in str(caught.value), tamper
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tamper", TAMPERINGS)
@pytest.mark.parametrize("file", READ)
def test_a_file_that_the_manifest_describes_is_refused_for_its_content(
    run: Path, tmp_path: Path, file: str, tamper: Callable[[Path], None], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nothing in the checkpoint is executed."""
    monkeypatch.chdir(tmp_path)
    checkpoint = copy_checkpoint(run, tmp_path)
    with signed_again(checkpoint):
        tamper(checkpoint / file)
    capfd.readouterr()
    code = run_here(finetune.main, "finetune.py", arguments(tmp_path, "--resume_from_checkpoint", checkpoint))
    err = capfd.readouterr().err
    assert not (tmp_path / "executed").exists()
    assert "unexpected" not in err and "Traceback" not in err
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("finetune.py: error: ") and str(checkpoint) in line, err
    assert "incomplete or damaged" not in line and (file in line or file == "trainer_state.json"), err


def test_an_unchanged_checkpoint_is_resumed(run: Path, tmp_path: Path) -> None:
    checkpoint = copy_checkpoint(run, tmp_path)
    with signed_again(checkpoint):
        pass
    finetune_here(*arguments(tmp_path, "--resume_from_checkpoint", checkpoint))
    name = "adapter_model.safetensors"
    assert (tmp_path / "new" / name).read_bytes() == (run / "new" / name).read_bytes()


def cut_a_moment(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:1]
    torch.save(state, path)


def drop_a_group(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save(state | {"param_groups": state["param_groups"][:1]}, path)


def write_the_rate_as_text(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["param_groups"][0]["lr"] = "fast"
    torch.save(state, path)


def write_the_epoch_as_text(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True) | {"last_epoch": "one"}, path)


def drop_a_matrix(path: Path) -> None:
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)


def cut_a_matrix(path: Path) -> None:
    tensors = load_file(path)
    name = min(tensors)
    save_file(tensors | {name: tensors[name][:1].clone()}, path)


def add_a_matrix(path: Path) -> None:
    save_file(load_file(path) | {"base_model.model.lm_head.weight": torch.zeros(960, 32)}, path)


def count_steps_as_text(path: Path) -> None:
    change_json(path, global_step="1")


def claim_another_step(path: Path) -> None:
    change_json(path, global_step=2)


def add_an_unknown_key(path: Path) -> None:
    change_json(path, unknown=1)


def change_the_callbacks(path: Path) -> None:
    change_json(path, stateful_callbacks={"RunLog": {"args": {}, "attributes": {"counts": {"steps": "many"}}}})


CONTENTS = [
    ("optimizer.pt", cut_a_moment), ("optimizer.pt", drop_a_group), ("optimizer.pt", write_the_rate_as_text),
    ("scheduler.pt", write_the_epoch_as_text), ("adapter_model.safetensors", drop_a_matrix),
    ("adapter_model.safetensors", cut_a_matrix), ("adapter_model.safetensors", add_a_matrix),
    ("trainer_state.json", count_steps_as_text), ("trainer_state.json", claim_another_step),
    ("trainer_state.json", add_an_unknown_key), ("trainer_state.json", change_the_callbacks),
]  # fmt: skip


@pytest.mark.parametrize(("file", "change"), CONTENTS)
def test_values_that_do_not_fit_the_run_are_refused(
    run: Path, tmp_path: Path, file: str, change: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = copy_checkpoint(run, tmp_path)
    with signed_again(checkpoint):
        change(checkpoint / file)
    capfd.readouterr()
    code = run_here(finetune.main, "finetune.py", arguments(tmp_path, "--resume_from_checkpoint", checkpoint))
    err = capfd.readouterr().err
    assert code == 2 and "unexpected" not in err, err
    line = err.splitlines()[-1]
    assert str(checkpoint) in line and "incomplete or damaged" not in line, err
