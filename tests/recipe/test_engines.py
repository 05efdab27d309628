"""Part of ``python -m benchmarks.engines``: two processes with an engine train as a single process does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from benchmarks.engines import ENGINES, MODES, QWEN, Result, Runs, compare, largest_difference
from planning.devices import find_device
from planning.expectation import Machine, Planner
from tests import fork_server
from tests.programs import require_program
from training.config.parsing import parse_args

LOSS, GRADIENTS = 1e-5, 1e-6
# Gradients of a delta net's decay are differences of large sums: another order of operations changes their last digits
# more, and ZeRO-3 calls layers that are one operation elsewhere. It is rounding: see ``--float64`` of the benchmark.
TOLERANCES = {"qwen": (LOSS, GRADIENTS), "qwen3_5": (1e-4, 2e-5)}
# ``test_two_ranks.py`` tests DDP. Gradients of the first step are compared once for each way of sharding them; under
# ZeRO-3 for Qwen3.5, too, whose delta nets use parameters of modules that they do not call.
CASES = [
    ("qwen", "full", "zero3", True),
    ("qwen", "full", "fsdp2", True),
    pytest.param("qwen", "lora_chatml_tokens", "fsdp2", False, marks=pytest.mark.long),
    ("qwen", "q_lora_nf4", "zero2", False),
    ("qwen3_5", "full", "zero3", True),
    pytest.param("qwen3_5", "full", "fsdp2", False, marks=pytest.mark.long),
    ("qwen3_5", "lora_embeddings_packed", "zero3", False),
]


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Runs]]:
    """Processes are forked, those of torchrun too, except in the tests of a whole FSDP run and of offloading."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHON_EXEC", fork_server.python())
        yield cache(lambda model: Runs(tmp_path_factory.mktemp(model), model))


@pytest.fixture
def runs(runs_of: Callable[[str], Runs]) -> Runs:
    return runs_of("qwen")


@cache
def alone(runs: Runs, mode: str) -> Result:
    """Result of a mode in one process."""
    return runs.train(f"{mode}-alone", MODES[mode], None)


@cache
def gradients_alone(runs: Runs, mode: str) -> Result:
    return runs.first_gradients(f"{mode}-alone-gradients", MODES[mode], None)


@pytest.mark.parametrize(("model", "mode", "engine", "with_gradients"), CASES)
def test_two_processes_train_as_one_does(
    runs_of: Callable[[str], Runs], model: str, mode: str, engine: str, with_gradients: bool
) -> None:
    runs = runs_of(model)
    gradients = gradients_alone(runs, mode) if with_gradients else None
    figures = compare(runs, mode, engine, alone(runs, mode), gradients)
    losses = alone(runs, mode).logged("loss")
    assert losses[-1] < losses[0]
    loss, gradient = TOLERANCES[model]
    assert figures["loss"] <= loss and figures["eval_loss"] <= loss
    assert figures.get("first_gradients", 0) <= gradient
    assert figures["same_files"] and figures.get("merges", True) and figures.get("same_answers", True)


@pytest.mark.long
@pytest.mark.parametrize("config", ["ds_config_zero2_offload.json", "ds_config_zero3_offload.json"])
def test_offloaded_optimizer_gives_the_same_losses(runs: Runs, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed compiles its optimizer for the CPU. The processes of ZeRO-2 are new ones."""
    require_program("g++", "g++")
    if "zero2" in config:
        monkeypatch.delenv("PYTHON_EXEC")
    offloaded = runs.train(config, MODES["full"], ["--deepspeed", f"finetune/{config}"])
    assert offloaded.code == 0, offloaded.stderr
    assert largest_difference(offloaded.logged("loss"), alone(runs, "full").logged("loss")) <= LOSS


def test_resumed_fsdp_run_ends_with_the_same_bits_and_holds_what_was_planned(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``benchmarks.kill_resume`` tests DDP and ZeRO. The processes of the whole run are new ones."""
    flags = ["--max_steps", 6, "--save_strategy", "steps", "--save_steps", 3, "--learning_rate", 1e-3]
    with monkeypatch.context() as patch:
        patch.delenv("PYTHON_EXEC")
        whole = runs.run("whole", MODES["lora_embeddings"], ENGINES["fsdp2"], *flags)
    assert whole.code == 0, whole.stderr
    checkpoint = whole.folder / "checkpoint-3"
    resumed = runs.run(
        "resumed", MODES["lora_embeddings"], ENGINES["fsdp2"], *flags, "--resume_from_checkpoint", checkpoint
    )
    assert resumed.code == 0, resumed.stderr
    assert resumed.logged("loss") == whole.logged("loss")[3:]
    weights = resumed.weights()
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.weights().items())
    planned = planned_optimizer_bytes(MODES["lora_embeddings"], ENGINES["fsdp2"], monkeypatch)
    assert planned == pytest.approx(saved_bytes(checkpoint / "optimizer_0", rank=0), rel=0.02)


def planned_optimizer_bytes(mode: list[str], engine: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of optimizer state that a plan of two processes expects in each."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = parse_args(
        ["--model_name_or_path", str(QWEN), "--use_cpu", "--plan", "--model_max_length", "64", *mode, *engine]
    )
    machine = Machine(find_device(None, use_cpu=True), memory_gib=8, gpus=2)
    return Planner(machine, hidden_size=32).expect(args).share.components["optimizer"]


def saved_bytes(folder: Path, rank: int) -> int:
    """Bytes of the float32 tensors that a rank has written to a sharded checkpoint, but for single numbers."""
    metadata = FileSystemReader(folder).read_metadata()
    mine = [index for index, place in metadata.storage_data.items() if place.relative_path.startswith(f"__{rank}_")]
    sizes = [
        chunk.sizes.numel()
        for index in mine
        for chunk in getattr(metadata.state_dict_metadata[index.fqn], "chunks", ())
        if chunk.offsets == index.offset
    ]
    return 4 * sum(size for size in sizes if size > 1)


def test_quantised_model_under_fsdp_is_refused_before_loading(runs: Runs) -> None:
    result = runs.train("refused", MODES["q_lora_nf4"], ["--fsdp"])
    assert result.code == 1 and "exitcode  : 2" in result.stderr  # the launcher's exit code, and that of its processes
    assert result.message.startswith("--q_lora: quantised weights cannot be sharded by FSDP2. ")
    assert not result.folder.exists()
