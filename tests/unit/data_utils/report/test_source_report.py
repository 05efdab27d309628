"""The counts of one source."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from chat.turns import ToolCall, Turn
from data_utils.report.source_report import SourceReport, count_answers
from tests.reports import exchange, spans


def test_counts_of_conversations_tokens_and_weights() -> None:
    source = SourceReport("a.json#500@x2", "alpaca", in_file=9)
    source.keep("a.json:1", spans((3, "system", 0.0), (4, "user", 0.0), (5, "assistant", 1.0)))
    source.keep("a.json:2", spans((2, "assistant", 0.5), (2, "tool", 0.0), (3, "assistant", 2.0)), copies=2)
    source.skip("a.json:3", "no answer fits", copies=2)
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


def test_empty_first_span_does_not_hide_the_untrained_first_token() -> None:
    source = SourceReport("a")
    source.keep("a:1", spans((0, "user", 1.0), (2, "assistant", 1.0), (0, "tool", 1.0)))
    assert source.trained_tokens == 1


def test_spans_must_cover_the_ids() -> None:
    with pytest.raises(AssertionError, match="the spans do not cover the ids"):
        SourceReport("a").keep("a:1", SimpleNamespace(input_ids=[1, 2], spans=[(1, "user", 0.0)], turns_dropped=0))


def test_empty_answers_are_counted() -> None:
    source = SourceReport("a.json")
    asked, untrained = Turn("user", "Hi"), Turn("assistant", "", weight=0.0)
    call = Turn("assistant", "", calls=(ToolCall("f", {}),))
    source.keep("a.json:1", exchange(1, 1), answers=count_answers([asked, Turn("assistant", " \n"), untrained, call]))
    source.keep("a.json:2", exchange(1, 2), answers=count_answers([asked, Turn("assistant", "Hello")]))
    assert source.answers == 3
    assert source.empty_answers.total == 1
    assert source.warnings() == ["a.json: 1 of 3 answers are empty: a.json:1"]
    source.keep(
        "a.json:3", exchange(1, 3), copies=4, answers=count_answers([Turn("assistant", ""), Turn("assistant", "Hello")])
    )
    assert source.answers == 3 + 4 * 2
    assert source.empty_answers.total == 1 + 4


@pytest.mark.parametrize("count", [1, 400, 777])
def test_percentiles_equal_numpy(count: int) -> None:
    source = SourceReport("a")
    lengths = [int(value) for value in np.random.default_rng(1).lognormal(8, 1, count) + 2]
    for number, length in enumerate(lengths):
        source.keep("a:1", exchange(1, length - 1, first_id=number))
    summary = source.length_summary()
    assert list(summary) == ["min", "5%", "25%", "50%", "75%", "95%", "99%", "max", "mean"]
    for percent in (5, 25, 50, 75, 95, 99):
        assert summary[f"{percent}%"] == np.percentile(lengths, percent, method="inverted_cdf")
    assert (summary["min"], summary["max"]) == (min(lengths), max(lengths))
    assert summary["mean"] == round(float(np.mean(lengths)), 1)
    assert SourceReport("b").length_summary() == {}


def test_read_must_equal_kept_plus_skipped() -> None:
    source = SourceReport("a.json")
    source.keep("a:1", exchange(1, 1))
    source.read += 1  # somebody else's count
    with pytest.raises(AssertionError, match=r"a\.json: read is not kept \+ skipped"):
        source.as_dict()


def test_json_keeps_100_locations() -> None:
    source = SourceReport("a")
    for number in range(1000):
        source.skip(f"a:{number}", "bad record")
    report_json = source.as_dict()
    assert report_json["skipped"] == 1000
    assert [entry["where"] for entry in report_json["skipped_at"]] == [f"a:{number}" for number in range(100)]
