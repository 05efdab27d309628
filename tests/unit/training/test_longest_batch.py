"""The longest micro-batch goes first on GPUs: it is found, it changes nothing, and memory errors name place and fix."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import RunError
from tests.commands import finetune_here
from tests.models import TINY, write_conversations
from training.checks import check_args
from training.config.parsing import parse_args
from training.joined_rows import Joining, token_budget
from training.longest_batch import find_longest, positions_of
from training.trainer import QwenTrainer


def joined(batches: Iterable[list[int]], budget: int, tokens: Callable[[list[int]], int]) -> list[list[int]]:
    """Join the micro-batches of a step, each the items in it, one after the other."""
    rows: list[list[int]] = []
    for batch in batches:
        if rows and tokens(rows[-1] + batch) <= budget:
            rows[-1] = rows[-1] + batch
        else:
            rows.append(batch)
    return rows


def test_the_longest_row_of_joined_micro_batches_is_found_among_those_of_all_ranks() -> None:
    chosen = random.Random(0)
    for _ in range(50):
        count, size = chosen.randint(1, 60), chosen.randint(1, 3)
        accumulation, processes = chosen.randint(1, 5), chosen.randint(1, 3)
        lengths = [chosen.randint(1, 100) for _ in range(count)]
        blanks = -count % (size * processes)
        orders = [[*chosen.sample(range(count), count), *range(count, count + blanks)] for _ in range(2)]
        joining = Joining(token_budget(lengths, size), accumulation, processes)

        def tokens(items: list[int], lengths: list[int] = lengths) -> int:
            return sum(lengths[item] if item < len(lengths) else 1 for item in items)

        rows = []
        for order in orders:
            batches = [order[start : start + size] for start in range(0, len(order), size)]
            steps = [
                batches[at : at + accumulation * processes] for at in range(0, len(batches), accumulation * processes)
            ]
            epoch = [
                joined(step[rank::processes], joining.budget, tokens) for step in steps for rank in range(processes)
            ]
            counted = sum(map(len, epoch)) / len(batches) * accumulation
            positions = positions_of(lengths, order, size, is_padded=False)
            assert joining.rows_per_step(positions) == pytest.approx(counted)
            rows += [row for rank in epoch for row in rank]
        found = find_longest(lengths, orders, size, False, 10**6, joining)
        assert found.positions == max(map(tokens, rows))
        assert found.indices in {tuple(item for item in row if item < count) for row in rows}


@pytest.mark.parametrize("is_padded", [False, True])
def test_the_longest_micro_batch_is_found_among_those_of_the_run(is_padded: bool) -> None:
    chosen = random.Random(0)
    for _ in range(50):
        count, size = chosen.randint(1, 30), chosen.randint(1, 5)
        lengths = [chosen.randint(1, 100) for _ in range(count)]
        blanks = -count % size
        orders = [[*chosen.sample(range(count), count), *range(count, count + blanks)] for _ in range(3)]
        limit = chosen.randint(1, 40)
        batches = [order[start : start + size] for order in orders for start in range(0, len(order), size)][:limit]
        sizes = [[lengths[item] if item < count else 1 for item in batch] for batch in batches]
        positions = [max(row) * len(row) if is_padded else sum(row) for row in sizes]
        found = find_longest(lengths, orders, size, is_padded, limit)
        assert found.positions == max(positions)
        assert found.indices in {tuple(item for item in batch if item < count) for batch in batches}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_conversations(tmp_path / "train.json")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Try the longest micro-batch on the CPU; return the positions of all micro-batches that are computed."""
    positions: list[int] = []
    compute = QwenTrainer.compute_loss

    def record(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        positions.append(inputs["input_ids"].numel())
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(QwenTrainer, "compute_loss", record)
    monkeypatch.setattr("training.trainer_memory.tries_longest_batch", lambda device: True)
    return positions


def train(data: Path, output: Path, *flags: object) -> dict[str, Tensor]:
    """Train an adapter, and return it."""
    from safetensors.torch import load_file

    finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--output_dir", output, "--use_lora", "--lora_r", 2,
        "--lora_dropout", 0.3, "--max_steps", 3, "--learning_rate", 1e-2, "--per_device_train_batch_size", 2,
        "--gradient_accumulation_steps", 2, "--save_strategy", "no", *flags,
    )  # fmt: skip
    return dict(load_file(output / "adapter_model.safetensors"))


def test_trying_the_longest_micro_batch_changes_no_bit(
    data: Path, tmp_path: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = train(data, tmp_path / "tried")
    positions, seen[:] = list(seen), []
    assert positions[0] == max(positions)
    monkeypatch.setattr("training.trainer_memory.tries_longest_batch", lambda device: False)
    plain = train(data, tmp_path / "plain")
    assert positions[1:] == seen
    assert all(torch.equal(tried[name], plain[name]) for name in plain)


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, fits: Any) -> None:
    """Let micro-batches fail that do not fit: ``fits(positions, number)``."""
    compute, counts = QwenTrainer.compute_loss, {"calls": 0}

    def fail(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        counts["calls"] += 1
        if not fits(inputs["input_ids"].numel(), counts["calls"]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(QwenTrainer, "compute_loss", fail)


def test_out_of_memory_names_the_place_and_what_helps(
    data: Path, tmp_path: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out_of_memory(monkeypatch, lambda positions, number: number != 6)
    with pytest.raises(RunError) as caught:
        train(data, tmp_path / "late", "--trainable_embeddings", "full", "--gradient_checkpointing", "True")
    assert str(caught.value).startswith(
        "Optimizer step 3: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.). "
        "Lower --per_device_train_batch_size 2 (and raise --gradient_accumulation_steps 2 by as much), "
        "lower --model_max_length, give --trainable_embeddings chatml_tokens, or see what fits with "
    )
    longest = seen[0]
    run_out_of_memory(monkeypatch, lambda positions, number: False)
    with pytest.raises(RunError) as caught:
        train(data, tmp_path / "early")
    place = f"The longest micro-batch of the run (2 items, {longest:,} positions): out of memory (CUDA "
    assert str(caught.value).startswith(place) and "Add --gradient_checkpointing, lower" in str(caught.value)


def test_a_micro_batch_that_does_not_fit_is_halved_and_accumulated(
    data: Path, tmp_path: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch, accumulation = "--per_device_train_batch_size", "--gradient_accumulation_steps"
    expected = train(data, tmp_path / "given", batch, 1, accumulation, 8)
    assert "does not fit" not in capsys.readouterr().err
    limit = max(seen)
    run_out_of_memory(monkeypatch, lambda positions, number: positions <= limit)
    found = train(data, tmp_path / "found", batch, 4, accumulation, 2, "--auto_find_batch_size")
    assert capsys.readouterr().err.count("does not fit: continuing with --per_device_train_batch_size") == 2
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("environment", "flags"), [({"WORLD_SIZE": "2"}, []), ({}, ["--fsdp"])])
def test_a_batch_size_is_not_searched_by_several_processes_or_under_an_engine(
    environment: dict[str, str], flags: list[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = [
        "--model_name_or_path", TINY, "--data_path", data, "--output_dir", tmp_path / "o", "--auto_find_batch_size",
        *flags,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="--auto_find_batch_size works in one process without an engine"):
        check_args(parse_args([str(word) for word in words]))
