"""Recipes: their flags are valid, their comments true, and the list says which fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from planning.published import published_config
from scripts import recipes
from scripts.recipes import FOLDER, Recipe
from tests.commands import finetune_here, logged_losses, run_here
from tests.golden import REPO
from tests.models import TINY, write_conversations
from training.checks import check_args
from training.config.parsing import parse_args

DATA = REPO / "examples" / "identity.json"
PATHS = sorted(FOLDER.glob("*.yaml"))
RUN = ("qwen-7b-base-lora", "qwen-7b-chat-lora")  # of the tiny model's family; tests/nightly runs all


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_flags_are_valid_and_the_model_is_published(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.read(path)
    if recipe.gpus > 1:
        monkeypatch.setenv("WORLD_SIZE", str(recipe.gpus))
    args = parse_args(["--config", str(path), "--data_path", str(DATA), "--output_dir", "out", "--plan"])
    check_args(args)
    assert published_config(args.model.model_name_or_path) is not None
    assert f"--config recipes/{path.name} " in recipe.command
    assert recipe.command.startswith("torchrun" if recipe.gpus > 1 else "python finetune.py")
    assert recipe.fits(recipe.gpu_gb, recipe.gpus)


def test_the_list_says_which_recipes_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(recipes.main, "recipes", ["--gpu_memory", 24, "--gpus", 1]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split()[1]: line.split()[0] for line in lines[: len(PATHS)]}
    assert list(shown) == [path.stem for path in PATHS]
    assert shown["qwen-7b-chat-lora"] == "fits" and shown["qwen-14b-chat-lora"] == shown["qwen-7b-full-zero3"] == "-"


def test_two_steps_of_a_recipe(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "train.json")
    for name in RUN:
        finetune_here(
            "--config", FOLDER / f"{name}.yaml", "--model_name_or_path", TINY, "--data_path", data, "--output_dir",
            tmp_path / name, "--max_steps", 2, "--bf16", "False",
        )  # fmt: skip
        assert len(logged_losses(tmp_path / name)) == 2


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["no-such-recipe"], "no recipe has no-such-recipe in its name. "),
        (["--gpu_memory", "0"], "--gpu_memory 0 is not valid; give more than 0"),
        (["--gpus", "-1"], "--gpus -1 is not valid; give more than 0"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(recipes.main, "recipes", arguments) == 2
    assert fault in capsys.readouterr().err
