"""Offloaded optimizers give the losses of one process. DeepSpeed compiles its own for some minutes of a core."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.engines import MODES, Runs, largest_difference
from tests import fork_server
from tests.programs import require_program

LOSS = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHON_EXEC", fork_server.python())
        yield Runs(tmp_path_factory.mktemp("engines"), "qwen")


@pytest.mark.parametrize("config", ["ds_config_zero2_offload.json", "ds_config_zero3_offload.json"])
def test_offloaded_optimizer_gives_the_same_losses(runs: Runs, config: str) -> None:
    require_program("g++", "g++")
    alone = runs.train("alone", MODES["full"], None)
    offloaded = runs.train(config, MODES["full"], ["--deepspeed", f"finetune/{config}"])
    assert offloaded.code == 0, offloaded.stderr
    assert largest_difference(offloaded.logged("loss"), alone.logged("loss")) <= LOSS
