"""What ``benchmarks.step`` compares: the same samples for every contender, counted alike, and honest figures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import step, step_contenders, step_profile
from benchmarks.step_inputs import STEP_SAMPLES, Samples
from errors import ConfigError

torch = pytest.importorskip("torch")


def make_samples(count: int, first: int = 0, rounds: int = 2) -> Samples:
    examples = [{"input_ids": [index] * (1 + index * 7 % 31), "labels": []} for index in range(count)]
    return Samples([{"number": index} for index in range(count)], examples, first, rounds)


def written(samples: Samples, order: str, start: int, folder: Path) -> list[int]:
    """Return the numbers of the samples in the order in which a process sees them."""
    samples.write(order, start, folder)
    numbers = [json.loads(line)["number"] for line in (folder / "records.jsonl").read_text().splitlines()]
    examples = json.loads((folder / "examples.json").read_text())
    assert [example["input_ids"][0] for example in examples] == numbers
    return numbers


def test_a_process_started_in_a_later_round_continues_with_the_samples_of_that_round(tmp_path: Path) -> None:
    samples = make_samples(100, first=1)
    through = written(samples, "same", 1, tmp_path / "a")
    later = written(samples, "same", 2, tmp_path / "b")
    assert through[:STEP_SAMPLES] == later[:STEP_SAMPLES] == list(range(16))  # the warm-up
    assert through[STEP_SAMPLES:] == list(range(32, 64))
    assert later[STEP_SAMPLES : 2 * STEP_SAMPLES] == list(range(48, 64))


def test_grouping_sorts_the_same_samples(tmp_path: Path) -> None:
    samples = make_samples(100)
    same, grouped = (written(samples, order, 0, tmp_path / order) for order in ("same", "grouped"))
    assert same != grouped and sorted(same) == sorted(grouped)
    lengths = [samples.lengths[number] for number in grouped[STEP_SAMPLES:]]
    assert lengths == sorted(lengths, reverse=True)


def test_packs_are_made_of_the_whole_file(tmp_path: Path) -> None:
    assert written(make_samples(100), "whole", 0, tmp_path / "whole") == list(range(100))


def test_padded_and_flat_batches_of_the_same_samples_count_the_same_tokens() -> None:
    from transformers import DataCollatorWithFlattening

    from data_utils.collate import Collator

    examples: Any = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
        {"input_ids": [5, 6], "labels": [-100, 6]},
    ]
    padded, flat = (step_contenders.count(collate(examples)) for collate in (Collator(0), DataCollatorWithFlattening()))
    assert padded == {"samples": 2, "real_tokens": 7, "trained_tokens": 4, "positions": 10}
    assert flat == {**padded, "positions": 7}


def test_steps_wait_for_their_line_and_report_what_they_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"input_ids": torch.ones(2, 4), "labels": torch.ones(2, 4), "attention_mask": torch.ones(2, 4)}
    trainer = SimpleNamespace(
        Trainer=type("Trainer", (), {"get_batch_samples": lambda self: ([batch, batch], 1)}),
        TrainerCallback=object,
        DEFAULT_CALLBACKS=[],
    )
    orders, reports = io.StringIO("\n"), io.StringIO()
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    step_contenders.follow_steps(trainer, orders, reports)
    for _ in range(2):
        assert trainer.Trainer().get_batch_samples() == ([batch, batch], 1)
        trainer.DEFAULT_CALLBACKS[0].on_step_end(None, None, None)
    first, second = (json.loads(line) for line in reports.getvalue().splitlines())
    assert ended == [0]  # no line was left for a third step
    counts = {"samples": 4, "real_tokens": 16, "trained_tokens": 12, "positions": 16}
    assert {name: first[name] for name in counts} == {name: second[name] for name in counts} == counts


def make_row(seconds: float, memory: int = 100, others: float = 0.0) -> dict[str, Any]:
    counts = {"samples": 16, "real_tokens": 1000, "trained_tokens": 400, "positions": 1300}
    times = {"seconds": seconds, "cpu_seconds": 2 * seconds, "busy": False}
    return {**counts, **times, "memory_mib": memory, "others_cpus": others}


def test_summaries_take_medians_and_compare_with_the_fastest_that_is_not_ours() -> None:
    rounds = {
        "ours_padded": [make_row(1.0, 50), make_row(2.0, 40), make_row(9.0, 45, others=0.7)],
        "original": [make_row(8.0, 400)],
        "hf_flat": [make_row(4.0, 200)],
    }
    summaries = {name: step.summary(rows) for name, rows in rounds.items()}
    step.add_ratios(summaries)
    ours = summaries["ours_padded"]
    assert (ours["seconds_per_step"], ours["real_tokens_per_second"], ours["samples_per_second"]) == (2.0, 500.0, 8.0)
    assert (ours["positions_per_real_token"], ours["memory_mib"], ours["others_cpus"]) == (1.3, 50, 0.7)
    assert (ours["speed_to_best_other"], ours["memory_to_hf_flat"]) == (2.0, 0.25)
    assert summaries["original"]["speed_to_best_other"] == 0.5


def test_contenders_in_bfloat16_are_compared_with_both_precisions() -> None:
    seconds = {"ours_flat": 3.0, "hf_flat": 4.0, "ours_bf16": 1.0, "hf_bf16": 2.0}
    summaries = {name: step.summary([make_row(value)]) for name, value in seconds.items()}
    step.add_ratios(summaries)
    assert summaries["ours_flat"]["speed_to_best_other"] == 1.333  # not beside the faster bfloat16
    assert "speed_to_best_float32" not in summaries["ours_flat"]
    assert summaries["ours_bf16"]["speed_to_best_other"] == 2.0
    assert summaries["ours_bf16"]["speed_to_best_float32"] == 4.0


def test_a_busy_machine_is_refused_with_the_flag_that_measures_all_the_same() -> None:
    step.check_others(0.02)
    with pytest.raises(ConfigError, match=r"other processes use 0\.80 of \d+ CPUs.*--busy"):
        step.check_others(0.8)


def test_trl_is_left_out_with_the_reason_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names = [name for name in step_contenders.CONTENDERS if step.is_installed(name)]
    assert set(step_contenders.CONTENDERS) - set(names) == {"trl_flat", "trl_packed"}
    assert "trl_flat: left out: trl is not installed (pip install trl)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm_", "matrix products"), ("mkldnn::_linear_pointwise", "matrix products"),
        ("aten::mul", "elementwise"), ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("_Projection", "Python and autograd"),
    ],
)  # fmt: skip
def test_operators_of_both_product_libraries_are_products_in_a_profile(operator: str, kind: str) -> None:
    assert step_profile.kind_of(operator) == kind
