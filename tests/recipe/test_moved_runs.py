"""A run that was moved, copied or named otherwise resumes where it is, with the weights of an uninterrupted run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import finetune
from tests.commands import PLAIN, finetune_here, names_in, read_json, run_here
from tests.models import CONVERSATIONS, TINY, write_conversations
from tests.recipe.test_resume import die_after

BEST = 2  # of the steps 2, 4 and 6, by the accuracy, which does not change: the first is the best


def arguments(folder: Path, output: object, *flags: object) -> list[object]:
    data = write_conversations(folder / "train.json", CONVERSATIONS[:6])
    held_out = write_conversations(folder / "eval.json", CONVERSATIONS[6:])
    return [
        *PLAIN,
        "--model_name_or_path", TINY, "--data_path", data, "--eval_data_path", held_out, "--output_dir", output,
        "--use_lora", "--lora_r", 4, "--max_steps", 6, "--per_device_train_batch_size", 2, "--logging_steps", 1,
        "--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "steps", "--eval_steps", 2,
        "--load_best_model_at_end", "--metric_for_best_model", "token_accuracy", "--save_total_limit", 2,
        "--learning_rate", 1e-4, *flags,
    ]  # fmt: skip


def result_of(output: Path) -> bytes:
    return (output / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `whole`, and with `out`: the same run, interrupted after step 4."""
    folder = tmp_path_factory.mktemp("runs")
    finetune_here(*arguments(folder, folder / "out", "--save_total_limit", 3))
    shutil.copytree(folder / "out", folder / "whole")
    die_after(folder / "out", 4)
    for step in (2, 4, 6):
        assert read_json(folder / "whole" / f"checkpoint-{step}" / "trainer_state.json")["best_global_step"] == BEST
    assert result_of(folder / "whole") == result_of(folder / "whole" / f"checkpoint-{BEST}")
    assert result_of(folder / "whole") != result_of(folder / "whole" / "checkpoint-6")
    return folder


def move(out: Path) -> Path:
    return out.rename(out.with_name("moved"))


def copy(out: Path) -> Path:
    return Path(shutil.copytree(out, out.with_name("copy")))


def copy_and_use_the_old_path_again(out: Path) -> Path:
    """At the old path another run has saved other weights under the same names."""
    moved = out.rename(out.with_name("moved"))
    finetune_here(*arguments(out.parent, out, "--seed", 7))
    return moved


def link(out: Path) -> Path:
    out.with_name("link").symlink_to(move(out), target_is_directory=True)
    return out.with_name("link")


def name_relatively(out: Path) -> Path:
    return Path(out.name)


CHANGES: dict[str, Callable[[Path], Path]] = {
    "moved": move,
    "copied": copy,
    "old path used again": copy_and_use_the_old_path_again,
    "symbolic link": link,
    "relative": name_relatively,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_at_another_path_keeps_its_best_checkpoint(
    runs: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    output = CHANGES[change](tmp_path / "out")
    finetune_here(*arguments(tmp_path, f"{output}/", "--resume_from_checkpoint", "auto"))
    assert result_of(output) == result_of(runs / "whole")
    assert read_json(output / "run_summary.json")["result_step"] == BEST
    checkpoints = [name for name in names_in(output) if name.startswith("checkpoint-")]
    assert checkpoints == [f"checkpoint-{BEST}", "checkpoint-6"]


def test_a_checkpoint_that_has_another_name_is_resumed(runs: Path, tmp_path: Path) -> None:
    """In a new output folder; the best checkpoint is found beside the one that is resumed."""
    shutil.copytree(runs / "out", tmp_path / "old")
    (tmp_path / "old" / "checkpoint-4").rename(tmp_path / "old" / "kept")
    (tmp_path / "latest").symlink_to(tmp_path / "old" / "kept")
    for name, resumed in (("a", tmp_path / "old" / "kept"), ("b", tmp_path / "latest")):
        finetune_here(*arguments(tmp_path, tmp_path / name, "--resume_from_checkpoint", resumed))
        assert result_of(tmp_path / name) == result_of(runs / "whole")


def test_a_best_checkpoint_that_is_missing_or_of_another_run_is_refused(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last weights would be taken for the best ones, or those of another run."""
    shutil.copytree(runs / "out" / "checkpoint-4", tmp_path / "copied" / "checkpoint-4")
    words = arguments(tmp_path, tmp_path / "new", "--resume_from_checkpoint", tmp_path / "copied" / "checkpoint-4")
    best = tmp_path / "copied" / f"checkpoint-{BEST}"
    what = f"--load_best_model_at_end: the best checkpoint before {tmp_path}/copied/checkpoint-4 is {best}, which"
    assert run_here(finetune.main, "finetune.py", words) == 2
    assert f"error: {what} does not exist. Copy it there" in capfd.readouterr().err.splitlines()[-1]
    finetune_here(*arguments(tmp_path, tmp_path / "other", "--seed", 7, "--max_steps", 2))
    shutil.copytree(tmp_path / "other" / f"checkpoint-{BEST}", best)
    assert run_here(finetune.main, "finetune.py", words) == 2
    assert f"error: {what} is of another run. " in capfd.readouterr().err.splitlines()[-1]
    finetune_here(*[word for word in words if word != "--load_best_model_at_end"])
    assert load_file(tmp_path / "new" / "adapter_model.safetensors").keys()


def test_a_finished_run_is_recognised_by_its_content(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its inputs have other paths now."""
    shutil.copytree(runs / "whole", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    before = result_of(tmp_path / "moved")
    words = arguments(Path(), "moved", "--save_total_limit", 3, "--resume_from_checkpoint", "auto")
    assert run_here(finetune.main, "finetune.py", words) == 0
    assert result_of(tmp_path / "moved") == before
