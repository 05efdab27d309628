"""Only what a manifest names is read from a checkpoint, and no path that a checkpoint contains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from errors import ConfigError
from tests.models import change_json
from training.run_folder.manifest import load_manifest, write_manifest
from training.run_folder.names import MANIFEST
from training.run_folder.resumed import find_best, find_unnamed, linked_checkpoint, load_state, reading

# Files that a run saves under an engine and reads when it resumes; the others are for other programs.
READ = {
    "one process": ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"],
    "several processes": ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_11.pth"],
    "shards": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
    "DeepSpeed": [
        "latest", "global_step4/mp_rank_00_model_states.pt", "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "scheduler.pt",
    ],
    "FSDP": [
        "pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/.metadata",
        "optimizer_0/__1_0.distcp", "scheduler.pt",
    ],
    "FSDP, full": ["pytorch_model_fsdp.bin", "optimizer.bin"],
}  # fmt: skip
UNREAD = ["config.json", "adapter_config.json", "tokenizer_config.json", "zero_to_fp32.py"]
UNNAMED = [
    "model.safetensors", "pytorch_model.bin", "adapter_model.bin", "optimizer.bin", "scaler.pt", "rng_state.pth",
    "other/adapter_model.safetensors", "other/adapter_config.json", "global_step9/mp_rank_00_model_states.pt",
    "pytorch_model_fsdp_0/.metadata", "optimizer_1/.metadata", "model.safetensors.index.json", "latest",
]  # fmt: skip


def write_checkpoint(folder: Path, names: list[str], best: str | None = None, step: int = 4) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"saved as {name}")
    state = {"global_step": step, "best_model_checkpoint": best, "log_history": [{"loss": 0.1 + 0.2}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(folder, step, {})
    return folder


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("engine", READ)
def test_a_library_sees_what_the_manifest_names(tmp_path: Path, engine: str) -> None:
    names = READ[engine]
    checkpoint = write_checkpoint(tmp_path / "checkpoint-4", [*names, *UNREAD])
    unnamed = sorted(set(UNNAMED) - set(names))
    for name in unnamed:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("of somebody else")
    assert find_unnamed(checkpoint, load_manifest(checkpoint)) == unnamed
    with linked_checkpoint(checkpoint) as links:
        assert files_in(links) == {*names, "trainer_state.json"}
        assert {(links / name).read_text() for name in names} == {f"saved as {name}" for name in names}
        intervals = dict.fromkeys(("logging_steps", "eval_steps", "save_steps"))  # those of the command count
        assert load_state(links) == load_state(checkpoint) | intervals
    assert not links.exists()


def test_without_a_manifest_the_files_that_libraries_know_are_read(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint-4", [*READ["one process"], *UNREAD])
    (checkpoint / MANIFEST).unlink()
    (checkpoint / "other").mkdir()
    (checkpoint / "other" / "adapter_model.safetensors").write_text("")
    with linked_checkpoint(checkpoint) as links:
        assert files_in(links) == {*READ["one process"], "trainer_state.json"}


@pytest.mark.parametrize("written", ["{out}/checkpoint-2", "out/checkpoint-2", "/gone/checkpoint-2/", "checkpoint-2"])
def test_the_best_checkpoint_is_found_by_its_name(tmp_path: Path, written: str) -> None:
    out, moved = tmp_path / "out", tmp_path / "moved"
    write_checkpoint(out / "checkpoint-2", [], step=2)
    write_checkpoint(out / "checkpoint-4", [], best=written.format(out=out))
    shutil.copytree(out, moved)
    with linked_checkpoint(moved / "checkpoint-4") as links:
        assert load_state(links)["best_model_checkpoint"] == str(moved / "checkpoint-2")
    shutil.rmtree(moved / "checkpoint-2")
    with linked_checkpoint(moved / "checkpoint-4") as links:
        assert load_state(links)["best_model_checkpoint"] is None


@pytest.mark.parametrize("written", [None, "", "..", "/etc", "out/checkpoint-", "out/checkpoint-2/.."])
def test_other_names_are_no_checkpoint(tmp_path: Path, written: str | None) -> None:
    assert find_best(tmp_path / "checkpoint-4", {"best_model_checkpoint": written, "global_step": 4}) is None


def test_the_best_checkpoint_may_be_the_resumed_one_under_another_name(tmp_path: Path) -> None:
    state = {"best_model_checkpoint": "/out/checkpoint-4", "global_step": 4}
    assert find_best(tmp_path / "kept", state) == tmp_path / "kept"


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint-4", [])
    change_json(checkpoint / MANIFEST, step=5)
    with (
        pytest.raises(ConfigError, match=r"manifest\.json was changed after it was written"),
        linked_checkpoint(checkpoint),
    ):
        pass


def test_errors_of_libraries_name_the_checkpoint(tmp_path: Path) -> None:
    checkpoint, links = tmp_path / "checkpoint-4", tmp_path / "links"
    for error in (KeyError("state"), ValueError(f"{links}/optimizer.pt\nis bad"), ConfigError(f"{links}: no weights")):
        with pytest.raises(ConfigError) as caught, reading(checkpoint, links, "the weights"):
            raise error
        assert str(checkpoint) in str(caught.value) and str(links) not in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(MemoryError), reading(checkpoint, links, "the weights"):
        raise MemoryError
