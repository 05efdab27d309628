"""Errors of a run report what was saved and how it resumes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from errors import RunError, Terminated
from tests.commands import limited_file_size, names_in
from training.run_folder.failures import explain_how_to_resume, saving_errors
from training.run_folder.staging import staged_checkpoint


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Terminated(), RunError("step 3: it broke")])
def test_errors_explain_how_to_resume(tmp_path: Path, error: BaseException) -> None:
    prefix = f"{error}. " if isinstance(error, RunError) else ""
    for steps, how in (
        ([], "No checkpoint was saved: the same command with --overwrite_output_dir starts over"),
        ([4], f"The same command with --resume_from_checkpoint {tmp_path / 'checkpoint-4'} resumes from there"),
    ):
        for step in steps:
            (tmp_path / f"checkpoint-{step}").mkdir()
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        with pytest.raises(type(error)) as caught, explain_how_to_resume(tmp_path):
            raise error
        assert str(caught.value) == prefix + how


def test_errors_of_saving_become_one_run_error(tmp_path: Path) -> None:
    advice = "Free some space there; what was saved before is unchanged"
    for folder in (tmp_path / "out", tmp_path / "out" / ".saving"):
        with pytest.raises(RunError) as caught, saving_errors(folder):
            raise OSError(28, "No space left on device")
        assert str(caught.value) == f"cannot save to {tmp_path / 'out'} (No space left on device). {advice}"
    with pytest.raises(RunError) as caught, limited_file_size(1000), saving_errors(tmp_path):
        torch.save(torch.zeros(10_000), tmp_path / "optimizer.pt")
    assert str(caught.value) == f"cannot save to {tmp_path} (torch.save could not write all of a file). {advice}"
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), saving_errors(tmp_path):
        raise RuntimeError("shapes differ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        full = pytest.raises(RunError, match="No space left on device")
        with full, saving_errors(tmp_path), staged_checkpoint(tmp_path / "checkpoint-1") as staged:
            staged.mkdir()
            (staged / "model.safetensors").write_bytes(bytes(100_000))
        assert names_in(tmp_path) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)
