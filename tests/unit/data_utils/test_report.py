"""What the account of the data counts, what it finds wrong, and what it says about batches."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from chat.turns import ToolCall, Turn
from data_utils.report.counts import ReasonCounts
from data_utils.report.data_report import DataReport, ReportSettings
from data_utils.report.padding import padding_shares
from data_utils.report.source_report import SourceReport
from tests.golden import REPO


def encoded(*spans: tuple[int, str, float], first_id: int = 0, turns_dropped: int = 0) -> Any:
    length = sum(span[0] for span in spans)
    ids = list(range(first_id, first_id + length))
    return SimpleNamespace(input_ids=ids, spans=list(spans), turns_dropped=turns_dropped)


def chat(asked: int, answered: int, first_id: int = 0, weight: float = 1.0) -> Any:
    return encoded((asked, "user", 0.0), (answered, "assistant", weight), first_id=first_id)


def report_of(lengths: Sequence[int], **settings: Any) -> DataReport:
    report = DataReport("train", ReportSettings(**settings))
    source = report.add_source("a.jsonl", "messages", len(lengths))
    for number, length in enumerate(lengths, 1):
        source.keep(f"a.jsonl:{number}", chat(1, length - 1, first_id=number))
    return report


def test_a_source_counts_conversations_tokens_and_weights() -> None:
    source = SourceReport("a.json#500@x2", "alpaca", in_file=9)
    source.keep("a.json:1", encoded((3, "system", 0.0), (4, "user", 0.0), (5, "assistant", 1.0)))
    source.keep("a.json:2", encoded((2, "assistant", 0.5), (2, "tool", 0.0), (3, "assistant", 2.0)), times=2)
    source.skip("a.json:3", "no answer fits", times=2)
    source.skip("a.json:4", "bad record")
    assert (source.in_file, source.read, source.kept) == (9, 6, 3)
    assert source.skipped.counts == {"no answer fits": 2, "bad record": 1}
    assert source.tokens == 12 + 2 * 7
    assert source.tokens_by_role == {"system": 3, "user": 4, "assistant": 5 + 2 * 5, "tool": 4}
    # The first token of the second sample is never predicted.
    assert source.trained_tokens == 5 + 2 * 4
    assert source.trained_by_role == {"assistant": 13}
    assert source.trained_weight == 5 + 2 * (0.5 + 6)
    assert source.lengths == {12: 1, 7: 2}
    assert source.trained_lengths == {5: 1, 4: 2}


def test_empty_spans_hide_no_first_token() -> None:
    source = SourceReport("a")
    source.keep("a:1", encoded((0, "user", 1.0), (2, "assistant", 1.0), (0, "tool", 1.0)))
    assert source.trained_tokens == 1


def test_spans_must_be_the_ids() -> None:
    with pytest.raises(AssertionError, match="spans that are not the ids"):
        SourceReport("a").keep("a:1", SimpleNamespace(input_ids=[1, 2], spans=[(1, "user", 0.0)], turns_dropped=0))


def test_answers_that_say_nothing() -> None:
    source = SourceReport("a.json")
    asked, untrained = Turn("user", "Hi"), Turn("assistant", "", weight=0.0)
    call = Turn("assistant", "", calls=(ToolCall("f", {}),))
    source.keep("a.json:1", chat(1, 1), turns=[asked, Turn("assistant", " \n"), untrained, call])
    source.keep("a.json:2", chat(1, 2), turns=[asked, Turn("assistant", "Hello")])
    assert source.answers == 3
    assert source.empty_answers.total == 1
    assert source.warnings() == ["a.json: 1 of 3 answers are empty: a.json:1"]
    source.keep("a.json:3", chat(1, 3), times=4, turns=[Turn("assistant", ""), Turn("assistant", "Hello")])
    assert source.answers == 3 + 4 * 2
    assert source.empty_answers.total == 1 + 4


def test_a_tally_keeps_a_hundred_places_of_fifty_kinds() -> None:
    tally = ReasonCounts()
    for number in range(1000):
        tally.add(f"reason {number % 60}", f"a:{number}", times=2)
    assert tally.total == 2000
    assert len(tally.counts) == 51
    # Ten reasons came too late to be told apart, 16 or 17 times each.
    assert tally.counts["others"] == 2 * sum(number % 60 >= 50 for number in range(1000))
    assert len(tally.places["others"]) == 100
    assert tally.places["reason 0"][:3] == ["a:0", "a:60", "a:120"]


def test_a_tally_names_a_file_once() -> None:
    tally = ReasonCounts()
    for line in range(1, 8):
        tally.add("x", f"data/a.json:{line} (record {line})")
    first = "data/a.json:1 (record 1), :2 (record 2), :3 (record 3), :4 (record 4), :5 (record 5), ..."
    assert tally.first("x") == first
    other = ReasonCounts()
    other.add("x", "a.jsonl:3 = a.jsonl:1")
    other.add("x", "b.jsonl:4 = a.jsonl:2")
    assert other.first("x") == "a.jsonl:3 = :1, b.jsonl:4 = :2"


def test_tallies_add_up() -> None:
    one, other = ReasonCounts(), ReasonCounts()
    one.add("x", "a:1", 3)
    for number in range(150):
        other.add("x", f"b:{number}")
    other.add("y", "b:0")
    both = one + other
    assert both.counts == {"x": 153, "y": 1}
    assert both.places["x"] == ["a:1", *(f"b:{number}" for number in range(99))]
    assert one.counts == {"x": 3}
    assert one.places == {"x": ["a:1"]}


def test_exact_copies_across_the_sources_of_a_set() -> None:
    report = DataReport("train")
    a, b = report.add_source("a.jsonl"), report.add_source("b.jsonl")
    a.keep("a.jsonl:1", chat(2, 3), times=3)
    a.keep("a.jsonl:2", chat(2, 3, first_id=1))
    a.keep("a.jsonl:3", chat(2, 3, weight=0.5))  # the same ids, but not the same weights
    a.keep("a.jsonl:4", chat(3, 2))
    assert a.duplicates.total == 0
    # How the ids are parted into spans makes no difference.
    b.keep("b.jsonl:1", encoded((1, "system", 0.0), (1, "user", 0.0), (1, "assistant", 1.0), (2, "tool", 1.0)))
    b.keep("b.jsonl:2", chat(2, 3), times=2)
    assert (a.distinct, b.distinct) == (4, 0)
    assert b.duplicates.places == {"exact copy": ["b.jsonl:1 = a.jsonl:1", "b.jsonl:2 = a.jsonl:1"]}
    assert report.total().duplicates.total == 2
    assert b.warnings() == [
        "b.jsonl: 2 samples are exact copies of earlier ones: b.jsonl:1 = a.jsonl:1, :2 = a.jsonl:1"
    ]
    # Another set is another matter.
    other = DataReport("eval").add_source("a.jsonl")
    other.keep("a.jsonl:1", chat(2, 3))
    assert other.duplicates.total == 0


def test_copies_among_many() -> None:
    source = SourceReport("a")
    numbers = [random.Random(0).randrange(1000) for _ in range(2)] + [index % 3000 for index in range(5000)]
    for place, number in enumerate(numbers):
        source.keep(f"a:{place}", chat(1, 2, first_id=number))
    assert source.distinct == len(set(numbers))
    assert source.duplicates.total == len(numbers) - len(set(numbers))


def test_a_full_disk_is_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceReport("a")
    source.keep("a:1", chat(1, 1))
    database = source.seen._database
    assert database is not None
    database.execute("PRAGMA max_page_count = 3")
    with pytest.raises(OSError, match="database or disk is full") as error:
        for number in range(1000):
            source.keep(f"a:{number}", chat(1, 1, first_id=number))
    assert error.value.strerror == "database or disk is full"
    source.seen.close()


@pytest.mark.parametrize("count", [1, 400, 777])
def test_lengths_are_those_numpy_finds(count: int) -> None:
    source = SourceReport("a")
    lengths = [int(value) for value in np.random.default_rng(1).lognormal(8, 1, count) + 2]
    for number, length in enumerate(lengths):
        source.keep("a:1", chat(1, length - 1, first_id=number))
    summary = source.length_summary()
    assert list(summary) == ["min", "5%", "25%", "50%", "75%", "95%", "99%", "max", "mean"]
    for percent in (5, 25, 50, 75, 95, 99):
        assert summary[f"{percent}%"] == np.percentile(lengths, percent, method="inverted_cdf")
    assert (summary["min"], summary["max"]) == (min(lengths), max(lengths))
    assert summary["mean"] == round(float(np.mean(lengths)), 1)
    assert SourceReport("b").length_summary() == {}


def test_fixed_and_single_batches() -> None:
    shares = padding_shares({10: 3, 30: 1}, row=40, batch_size=1)
    assert list(shares) == ["fixed", "dynamic", "grouped"]
    assert shares["fixed"] == pytest.approx(1 - 60 / 160)
    assert (shares["dynamic"], shares["grouped"]) == (0, 0)
    assert padding_shares({}, row=40) == {}
    assert padding_shares({50: 2}, row=40)["fixed"] == 0  # a longer sample makes the rows longer


@pytest.mark.parametrize("batch_size", [2, 3, 7, 20])
def test_dynamic_padding_is_what_random_batches_need(batch_size: int) -> None:
    lengths = [3, 3, 5, 8, 8, 8, 20]

    def expected(drawn: int) -> float:
        return float(np.mean([max(batch) for batch in combinations(lengths, drawn)])) if drawn else 0.0

    whole, rest = divmod(len(lengths), batch_size)
    computed = whole * batch_size * (expected(batch_size) if whole else 0.0) + rest * expected(rest)
    share = padding_shares(Counter(lengths), 64, batch_size)["dynamic"]
    assert share == pytest.approx(1 - sum(lengths) / computed)


@pytest.mark.parametrize(("count", "accumulation"), [(3000, 1), (3000, 4), (60, 2)])
def test_grouped_padding_is_what_transformers_comes_to(count: int, accumulation: int) -> None:
    random_lengths = np.random.default_rng(3).lognormal(5, 1, count).astype(int) + 1
    lengths = random_lengths.tolist()
    shares = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        order = get_length_grouped_indices(lengths, 4 * accumulation, generator=generator)
        batches = [[lengths[index] for index in order[start : start + 4]] for start in range(0, count, 4)]
        shares.append(1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches))
    share = padding_shares(Counter(lengths), 8192, 4, accumulation)["grouped"]
    assert share == pytest.approx(np.mean(shares), abs=max(0.01, 3 * float(np.std(shares))))


def test_grouped_padding_of_more_samples_than_are_drawn() -> None:
    few = padding_shares({100: 20_000, 200: 20_000, 900: 20_000}, 1000, 4)["grouped"]
    many = padding_shares({100: 2_000_000, 200: 2_000_000, 900: 2_000_000}, 1000, 4)["grouped"]
    assert 0 < few < 0.02
    assert many == pytest.approx(few, rel=0.2)


@pytest.mark.parametrize(
    ("kept", "sizes", "run", "steps"),
    [
        (64, (4, 8, 2), {"epochs": 3}, (1, 3)),
        (65, (4, 8, 2), {"epochs": 3}, (2, 6)),
        (7, (2, 1, 1), {"epochs": 0.5}, (4, 2)),
        (7, (2, 1, 1), {"epochs": 1.3}, (4, 6)),
        (3, (4, 8, 2), {"epochs": 2}, (1, 2)),
        (64, (4, 8, 2), {"max_steps": 5}, (1, 5)),
    ],
)
def test_steps(kept: int, sizes: tuple[int, int, int], run: dict[str, Any], steps: tuple[int, int]) -> None:
    batch_size, accumulation, world_size = sizes
    report = report_of([5] * kept, batch_size=batch_size, accumulation=accumulation, world_size=world_size, **run)
    assert report.steps() == steps


def test_repeats_count_as_steps() -> None:
    report = DataReport("train", ReportSettings(batch_size=4))
    report.add_source("a@x10").keep("a:1", chat(1, 1), times=10)
    assert report.steps() == (3, 3)


def test_as_json() -> None:
    report = DataReport("train", ReportSettings(model_max_length=64, batch_size=2))
    a, b = report.add_source("a.json", "alpaca", 4), report.add_source("b.jsonl@x2", "messages", 1)
    a.keep("a.json:1", chat(2, 3))
    a.keep("a.json:2", chat(2, 3), truncated="cut")
    a.keep("a.json:3", chat(4, 4), ["name"])
    a.skip("a.json:4", "no answer fits")
    b.keep("b.jsonl:1", encoded((3, "user", 0.0), (3, "assistant", 1.0), turns_dropped=2), times=2)
    report.finish()
    told = json.loads(json.dumps(report.as_dict()))
    counts = {
        "path": "a.json, b.jsonl@x2",
        "format": "alpaca, messages",
        "in_file": 5,
        "read": 6,
        "kept": 5,
        "skipped": 1,
        "truncated": 3,
        "duplicates": 1,
        "answers": 0,
        "empty_answers": 0,
        "tokens": 5 + 5 + 8 + 12,
        "trained_tokens": 3 + 3 + 4 + 6,
        "trained_weight": 16.0,
        "tokens_by_role": {"assistant": 16, "user": 14},
        "trained_by_role": {"assistant": 16},
    }
    assert {name: told[name] for name in counts} == counts
    assert list(told)[: len(counts)] == list(counts)
    assert told["lengths"] == {
        **{"min": 5, "5%": 5, "25%": 5, "50%": 6, "75%": 6, "95%": 8, "99%": 8, "max": 8},
        "mean": 6.0,
    }
    assert told["skipped_at"] == [{"where": "a.json:4", "reason": "no answer fits"}]
    assert told["truncated_at"] == ["a.json:2", "b.jsonl:1"]
    assert told["truncated_by_kind"] == {"cut": 1, "too long": 2}
    assert told["duplicates_at"] == ["a.json:2 = a.json:1"]
    assert told["unfilled"] == {"name": 1}
    assert (told["steps_per_epoch"], told["steps"]) == (3, 3)
    assert told["padding"]["fixed"] == round(1 - 30 / (5 * 64), 6)
    assert told["settings"]["model_max_length"] == 64
    assert [source["path"] for source in told["sources"]] == ["a.json", "b.jsonl@x2"]
    assert [source["read"] for source in told["sources"]] == [4, 2]
    assert "steps" not in DataReport("eval").as_dict()


def test_read_is_kept_and_skipped() -> None:
    source = SourceReport("a.json")
    source.keep("a:1", chat(1, 1))
    source.read += 1  # somebody else's count
    with pytest.raises(AssertionError, match=r"a\.json: read is not kept \+ skipped"):
        source.as_dict()


def test_the_file_keeps_a_hundred_places() -> None:
    source = SourceReport("a")
    for number in range(1000):
        source.skip(f"a:{number}", "bad record")
    told = source.as_dict()
    assert told["skipped"] == 1000
    assert [entry["where"] for entry in told["skipped_at"]] == [f"a:{number}" for number in range(100)]


def test_warnings_in_words() -> None:
    report = DataReport("train", ReportSettings(batch_size=4, accumulation=2))
    source = report.add_source("a.json", "alpaca", 1004)
    for line in (1, 2):
        source.skip(f"a.json:{line}", "no answer fits within --model_max_length 64", times=500)
    source.skip("a.json:3", "bad record")
    source.keep("a.json:4", chat(1, 3), ["name", "author"], truncated="cut")
    source.keep("a.json:5", chat(2, 3), ["name"])
    nothing = report.add_source("b.json")
    nothing.skip("b.json:1", "bad record")
    report.add_source("empty.json")
    assert report.warnings() == [
        "a.json: skipped 1,000 of 1,003 conversations, no answer fits within --model_max_length 64: a.json:1, :2",
        "a.json: skipped 1 of 1,003 conversations, bad record: a.json:3",
        "a.json: shortened 1 of 1,003 conversations, cut: a.json:4",
        "a.json: 2 of 1,003 conversations hold {{name}} as it stands, --fill name=... fills it: a.json:4, :5",
        "a.json: 1 of 1,003 conversations hold {{author}} as it stands, --fill author=... fills it: a.json:4",
        "b.json: skipped 1 of 1 conversations, bad record: b.json:1",
        "b.json: nothing is left of it",
        "a step takes 8 samples, but there are 2: an epoch is one step",
    ]
    assert report.warnings(places=False)[1] == "a.json: skipped 1 of 1,003 conversations, bad record"
    assert report.problems() == []


def test_sound_data_needs_no_words() -> None:
    report = report_of([5, 6, 7])
    assert report.warnings() == []
    assert report.problems() == []


def test_problems_nothing_read_or_left() -> None:
    report = DataReport("train")
    assert report.problems() == ["nothing is left of 0 conversations"]
    report.add_source("a").skip("a:1", "no answer fits", times=2)
    assert report.problems() == ["nothing is left of 2 conversations: 2 skipped, no answer fits"]


def test_problem_nothing_trained() -> None:
    report = DataReport("train", ReportSettings(label_mask="last"))
    source = report.add_source("a")
    source.keep("a:1", chat(1, 3, weight=0.0))
    source.keep("a:2", encoded((1, "assistant", 1.0)))  # its only token is the first
    assert report.problems() == [
        "nothing is trained: none of 5 tokens counts in the loss. Look at --label_mask last, and at train, loss and "
        "weight in the data"
    ]
    source.keep("a:3", chat(1, 1))
    assert report.problems() == []


def test_problem_every_sample_shortened() -> None:
    report = DataReport("train", ReportSettings(model_max_length=16))
    source = report.add_source("a")
    source.keep("a:1", chat(1, 15), truncated="cut")
    source.keep("a:2", chat(2, 14), truncated="too long", times=3)
    assert report.problems() == ["every one of 4 samples was shortened. Raise --model_max_length 16"]
    source.keep("a:3", chat(3, 3))
    assert report.problems() == []


def test_problem_all_answers_empty() -> None:
    report = DataReport("train")
    source = report.add_source("a")
    for number in range(2):
        source.keep(f"a:{number}", chat(3, 2, first_id=number), turns=[Turn("user", "Hi"), Turn("assistant", "")])
    assert report.problems() == ["all 2 answers are empty. Look at what the data holds, and where"]
    source.keep("a:3", chat(3, 5), turns=[Turn("assistant", "Hello")])
    assert report.problems() == []


def test_problem_all_samples_the_same() -> None:
    report = DataReport("train")
    source = report.add_source("a@x2")
    source.keep("a:1", chat(3, 2), times=2)
    assert report.problems() == []  # asked for
    source.keep("a:2", chat(3, 2), times=2)
    assert report.problems() == ["all 4 samples are the same. Look at what the data holds"]
    source.keep("a:3", chat(3, 3))
    assert report.problems() == []


def test_names_and_reasons_are_harmless_from_the_start() -> None:
    report = DataReport("train", ReportSettings(model="\x1b[1m\udc80"))
    source = report.add_source("a\x1b[2J\n\udc80.json")
    source.skip("a\x07:1", "unknown role '\u202e\ud800'")
    source.keep("b\x9b:1", chat(1, 1), ["\x00"])
    report.add_source("x" * 5_000_000)
    told = json.dumps(report.as_dict(), ensure_ascii=False)
    told.encode()
    assert "a␛[2J␊\\\\udc80.json: skipped 1 of 2 conversations, unknown role '\\\\u202e\\\\ud800': a␇:1" in told
    assert "b\\\\x9b:1" in told
    assert len(told) < 10_000
    assert all(char.isprintable() for line in report.warnings() for char in line)


def test_a_report_travels_to_other_processes() -> None:
    report = report_of([5, 6])
    copy = pickle.loads(pickle.dumps(report))
    assert copy == report
    assert copy.as_dict() == report.as_dict()
    report.finish()


def test_the_account_needs_no_torch() -> None:
    code = "import sys; import data_utils.report.page, data_utils.report.terminal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0
