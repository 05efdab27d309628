"""Every contender of ``benchmarks.step`` that can run here trains the same samples, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.step import started
from benchmarks.step_contenders import CONTENDERS, Task
from benchmarks.step_inputs import STEP_SAMPLES, Samples, read_samples
from tests.golden import REPO
from tests.models import write_later_checkpoint

ROUNDS = 2
CASES = [(name, "lora") for name in CONTENDERS]
CASES += [(name, mode) for name in ("ours_flat", "hf_flat") for mode in ("full", "lora_embeddings")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Samples]:
    model = tmp_path_factory.mktemp("models") / "model"
    write_later_checkpoint(model, "qwen2")
    return model, read_samples(model, REPO / "examples" / "identity.json", 0, ROUNDS)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_contender_trains_the_samples_of_each_round(
    name: str, mode: str, inputs: tuple[Path, Samples], tmp_path: Path
) -> None:
    contender = CONTENDERS[name]
    if contender.kind == "trl":
        pytest.importorskip("trl")
    model, samples = inputs
    samples.write(contender.order, 0, tmp_path / "samples")
    batch, accumulation = (1, 2) if contender.packed else (2, STEP_SAMPLES // 2)
    task = Task(name, mode, str(model), str(tmp_path / "samples"), str(tmp_path / "output"), batch, accumulation, 0)
    with started(task, threads=1) as process:
        rows = [process.step() for _ in range(ROUNDS)]
    assert all(row["seconds"] > 0 and row["memory_mib"] > 0 for row in rows)
    lengths = samples.lengths
    if contender.packed:
        assert all(row["real_tokens"] <= row["positions"] for row in rows)
        return
    assert [row["samples"] for row in rows] == [STEP_SAMPLES] * ROUNDS
    tokens = [sum(lengths[STEP_SAMPLES * number :][:STEP_SAMPLES]) for number in range(1, ROUNDS + 1)]
    real = [row["real_tokens"] for row in rows]
    assert sum(real) == sum(tokens) if contender.order == "grouped" else real == tokens
