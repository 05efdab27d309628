"""Each recipe: what its file says is what a rehearsal expects, and two steps run on a tiny model of its family."""

from __future__ import annotations

from pathlib import Path

import pytest

from planning.published import published_config
from scripts.recipes import FOLDER, Recipe, rehearse
from tests.commands import logged_losses, run_well
from tests.models import TINY, copy_checkpoint, write_conversations, write_later_checkpoint
from training.config.parsing import parse_args

PATHS = sorted(FOLDER.glob("*.yaml"))
TEMPLATES = {"qwen2": "qwen2_5", "qwen3": "qwen3", "qwen3_5_text": "qwen3_5_think"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_file_says_what_a_rehearsal_expects(path: Path) -> None:
    recipe = Recipe.read(path)
    expected = rehearse(path, recipe.gpus, recipe.gpu_gb, recipe.tflops)
    assert expected.share.peak_bytes / 2**30 == pytest.approx(recipe.peak_gib, rel=0.02, abs=0.06)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_two_steps(path: Path, shared: Path, tmp_path: Path) -> None:
    name = parse_args(["--config", str(path), "--plan"]).model.model_name_or_path
    config = published_config(name)
    assert config is not None
    if config["model_type"] == "qwen":
        model = TINY if "Chat" in name else copy_checkpoint(tmp_path / "model", chat_format="raw")
    else:
        template = shared / "families" / "templates" / f"{TEMPLATES[config['model_type']]}.jinja"
        kind = config["model_type"].removesuffix("_text")
        is_tied = bool(config["tie_word_embeddings"])
        model = write_later_checkpoint(tmp_path / "model", kind, template.read_text(), is_tied)
    data = write_conversations(tmp_path / "train.json")
    flags = ["--config", path, "--model_name_or_path", model, "--data_path", data, "--output_dir", tmp_path / "out"]
    flags += ["--max_steps", 2, "--use_cpu", "True", "--disable_tqdm", "True"]
    processes = min(Recipe.read(path).gpus, 2)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
    run_well(*start, "finetune.py", *flags)
    assert len(logged_losses(tmp_path / "out")) == 2
