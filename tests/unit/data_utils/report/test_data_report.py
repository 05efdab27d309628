"""The report of a set: steps, JSON, warnings and problems."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from typing import Any

import pytest

from data_utils.report.data_report import DataReport, ReportSettings
from data_utils.report.page import render_html
from data_utils.report.terminal import render_report
from tests.golden import REPO
from tests.reports import exchange, report_of_lengths, spans


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
def test_steps_per_epoch_and_in_total(
    kept: int, sizes: tuple[int, int, int], run: dict[str, Any], steps: tuple[int, int]
) -> None:
    batch_size, accumulation, world_size = sizes
    report = report_of_lengths(
        [5] * kept, batch_size=batch_size, accumulation=accumulation, world_size=world_size, **run
    )
    assert report.steps() == steps


def test_repeated_samples_count_in_steps() -> None:
    report = DataReport("train", ReportSettings(batch_size=4))
    report.add_source("a@x10").keep("a:1", exchange(1, 1), copies=10)
    assert report.steps() == (3, 3)


def test_json_of_a_report() -> None:
    report = DataReport("train", ReportSettings(model_max_length=64, batch_size=2))
    a, b = report.add_source("a.json", "alpaca", 4), report.add_source("b.jsonl@x2", "messages", 1)
    a.keep("a.json:1", exchange(2, 3))
    a.keep("a.json:2", exchange(2, 3), truncated="cut")
    a.keep("a.json:3", exchange(4, 4), ["name"])
    a.skip("a.json:4", "no answer fits")
    b.keep("b.jsonl:1", spans((3, "user", 0.0), (3, "assistant", 1.0), turns_dropped=2), copies=2)
    report.close()
    report_json = json.loads(json.dumps(report.as_dict()))
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
        "answers_trained": 0,
        "answers_with_thinking": 0,
        "split": 0,
        "split_samples": 0,
        "repeated_tokens": 0,
        "tokens": 5 + 5 + 8 + 12,
        "trained_tokens": 3 + 3 + 4 + 6,
        "trained_weight": 16.0,
        "tokens_by_role": {"assistant": 16, "user": 14},
        "trained_by_role": {"assistant": 16},
    }
    assert {name: report_json[name] for name in counts} == counts
    assert list(report_json)[: len(counts)] == list(counts)
    assert report_json["lengths"] == {
        **{"min": 5, "5%": 5, "25%": 5, "50%": 6, "75%": 6, "95%": 8, "99%": 8, "max": 8},
        "mean": 6.0,
    }
    assert report_json["skipped_at"] == [{"where": "a.json:4", "reason": "no answer fits"}]
    assert report_json["truncated_at"] == ["a.json:2", "b.jsonl:1"]
    assert report_json["truncated_by_kind"] == {"cut": 1, "too long": 2}
    assert report_json["duplicates_at"] == ["a.json:2 = a.json:1"]
    assert report_json["unfilled"] == {"name": 1}
    assert (report_json["steps_per_epoch"], report_json["steps"]) == (3, 3)
    assert report_json["padding"]["fixed"] == round(1 - 30 / (5 * 64), 6)
    assert report_json["settings"]["model_max_length"] == 64
    assert [source["path"] for source in report_json["sources"]] == ["a.json", "b.jsonl@x2"]
    assert [source["read"] for source in report_json["sources"]] == [4, 2]
    assert "steps" not in DataReport("eval").as_dict()


def test_warning_texts() -> None:
    report = DataReport("train", ReportSettings(batch_size=4, accumulation=2))
    source = report.add_source("a.json", "alpaca", 1004)
    for line in (1, 2):
        source.skip(f"a.json:{line}", "no answer fits within --model_max_length 64", copies=500)
    source.skip("a.json:3", "bad record")
    source.keep("a.json:4", exchange(1, 3), ["name", "author"], truncated="cut")
    source.keep("a.json:5", exchange(2, 3), ["name"])
    nothing = report.add_source("b.json")
    nothing.skip("b.json:1", "bad record")
    report.add_source("empty.json")
    assert report.warnings() == [
        "a.json: skipped 1,000 of 1,003 conversations, no answer fits within --model_max_length 64: a.json:1, :2",
        "a.json: skipped 1 of 1,003 conversations, bad record: a.json:3",
        "a.json: shortened 1 of 1,003 conversations, cut: a.json:4",
        "a.json: 2 of 1,003 conversations contain the placeholder {{name}}, which --fill name=... fills: a.json:4, :5",
        "a.json: 1 of 1,003 conversations contain the placeholder {{author}}, which --fill author=... fills: a.json:4",
        "b.json: skipped 1 of 1 conversations, bad record: b.json:1",
        "b.json: none of its conversations can be used",
        "a step uses 8 samples, but there are only 2: an epoch is one step. Lower --per_device_train_batch_size 4 or "
        "--gradient_accumulation_steps 2 for more steps",
    ]
    assert report.warnings(with_locations=False)[1] == "a.json: skipped 1 of 1,003 conversations, bad record"
    assert report.problems() == []


def test_good_data_has_no_warnings_or_problems() -> None:
    report = report_of_lengths([5, 6, 7])
    assert report.warnings() == []
    assert report.problems() == []


def test_problem_no_conversation_can_be_used() -> None:
    report = DataReport("train")
    assert report.problems() == ["none of 0 conversations can be used"]
    report.add_source("a").skip("a:1", "no answer fits", copies=2)
    assert report.problems() == ["none of 2 conversations can be used: 2 skipped, no answer fits"]


def test_problem_no_token_is_trained() -> None:
    report = DataReport("train", ReportSettings(label_mask="last"))
    source = report.add_source("a")
    source.keep("a:1", exchange(1, 3, weight=0.0))
    source.keep("a:2", spans((1, "assistant", 1.0)))  # its only token is the first
    assert report.problems() == [
        "no token is trained: none of 5 tokens counts in the loss. Check --label_mask last, and the fields train, loss "
        "and weight of the turns"
    ]
    source.keep("a:3", exchange(1, 1))
    assert report.problems() == []


def test_problem_all_samples_shortened() -> None:
    report = DataReport("train", ReportSettings(model_max_length=16))
    source = report.add_source("a")
    source.keep("a:1", exchange(1, 15), truncated="cut")
    source.keep("a:2", exchange(2, 14), truncated="too long", copies=3)
    assert report.problems() == ["all 4 conversations were shortened. Raise --model_max_length 16"]
    source.keep("a:3", exchange(3, 3))
    assert report.problems() == []


def test_length_that_would_fit_is_named() -> None:
    """The longest, and that of 95 % if most are too long; no length that the model does not allow."""
    report = DataReport("train", ReportSettings(model_max_length=16))
    source = report.add_source("a")
    for number in range(1, 41):
        source.skip(f"a:{number}", "no answer fits within --model_max_length 16")
        source.count_too_long(10 * number + 10, 0)
    what = "none of 40 conversations can be used: 40 skipped, no answer fits within --model_max_length 16"
    both = "--model_max_length 410 keeps all of them, 390 keeps 95%"
    assert report.problems() == [f"{what}. {both}"]
    assert report.warnings()[0].endswith(f" are left out. {both}")
    for positions, advice in {
        400: "--model_max_length 400 is the most that the model allows, 390 keeps 95%",
        100: "--model_max_length 100 is the most that the model allows",
        16: "The longest has 410 tokens, and the model allows 16",
    }.items():
        report.settings = ReportSettings(model_max_length=16, positions=positions)
        assert report.fitting_length() == advice
    report.settings = ReportSettings(model_max_length=16)
    for number in range(45):
        source.keep(f"b:{number}", exchange(3, 3, first_id=number))
    assert report.fitting_length() == "--model_max_length 410 keeps all of them", "most fit"


def test_problem_all_answers_empty() -> None:
    report = DataReport("train")
    source = report.add_source("a")
    for number in range(2):
        source.keep(
            f"a:{number}",
            exchange(3, 2, first_id=number),
            answers=(1, 1),
        )
    assert report.problems() == ["all 2 answers are empty. Check which field of the data has the answers"]
    source.keep("a:3", exchange(3, 5), answers=(1, 0))
    assert report.problems() == []


def test_problem_all_samples_identical() -> None:
    report = DataReport("train")
    source = report.add_source("a@x2")
    source.keep("a:1", exchange(3, 2), copies=2)
    assert report.problems() == []  # asked for
    source.keep("a:2", exchange(3, 2), copies=2)
    assert report.problems() == ["all 4 samples are identical. Check the data"]
    source.keep("a:3", exchange(3, 3))
    assert report.problems() == []


def test_control_characters_in_names_and_reasons_are_replaced() -> None:
    report = DataReport("train", ReportSettings(model="\x1b[1m\udc80"))
    source = report.add_source("a\x1b[2J\n\udc80.json")
    source.skip("a\x07:1", "unknown role '\u202e\ud800'")
    source.keep("b\x9b:1", exchange(1, 1), ["\x00"])
    report.add_source("x" * 5_000_000)
    report_json = json.dumps(report.as_dict(), ensure_ascii=False)
    report_json.encode()
    assert "a␛[2J␊\\\\udc80.json: skipped 1 of 2 conversations, unknown role '\\\\u202e\\\\ud800': a␇:1" in report_json
    assert "b\\\\x9b:1" in report_json
    assert len(report_json) < 10_000
    assert all(char.isprintable() for line in report.warnings() for char in line)


def test_report_can_be_pickled() -> None:
    report = report_of_lengths([5, 6])
    copy = pickle.loads(pickle.dumps(report))
    assert copy == report
    assert copy.as_dict() == report.as_dict()
    report.close()


def test_report_does_not_import_torch() -> None:
    code = "import sys; import data_utils.report.page, data_utils.report.terminal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


def test_packs_are_counted_and_replace_samples_in_steps() -> None:
    lengths = [60, 40, 30, 30, 20, 10, 10]
    run = {"model_max_length": 100, "batch_size": 2, "accumulation": 2, "packing": True}
    report = report_of_lengths(lengths, **run)
    assert report.packs() == 2 and report.steps() == (1, 1)
    assert report.as_dict()["packing"] == {"packs": 2, "capacity": 100, "fill": 1.0}
    assert report.describe_packing() == "7 samples in 2 packs of up to 100 tokens, 100.0% filled"
    assert "A step uses 4 packs of up to 100 tokens: 2 per device x 2" in report.describe_steps()
    assert report.warnings() == [
        "a step uses 4 packs of up to 100 tokens, but there are only 2: an epoch is one step. Lower "
        "--per_device_train_batch_size 2 or --gradient_accumulation_steps 2 for more steps"
    ]
    for text in (render_report(report, color=False), render_html([report])):
        assert "7 samples in 2 packs of up to 100 tokens, 100.0% filled." in text
    report.name = "eval"
    assert report.packs() == 0 and report.as_dict()["packing"] is None and report.describe_packing() == ""


def test_sources_in_sequence_are_packed_separately() -> None:
    report = DataReport("train", ReportSettings(model_max_length=100, packing=True, by_source=True))
    for name in ("a.json", "b.json"):
        report.add_source(name).keep(f"{name}:1", exchange(10, 20))
    assert report.packs() == 2


def test_plain_text_decides_whether_samples_are_packed() -> None:
    report = DataReport("train", ReportSettings(model_max_length=100, packing=None))
    report.add_source("a.json", "messages").keep("a.json:1", exchange(10, 20))
    assert report.packs() == 0
    assert report.describe_packing() == "Off: --packing auto packs training data that contains plain text"
    report.add_source("b.jsonl", "text").keep("b.jsonl:1", spans((30, "text", 1.0)))
    assert report.packs() == 1


def test_report_says_why_plain_text_is_not_packed() -> None:
    report = DataReport("train", ReportSettings(packing=False, unpacked="batches are padded: --padding_free False"))
    report.add_source("a.json", "messages").keep("a.json:1", exchange(10, 20))
    assert report.describe_packing() == ""
    report.add_source("b.jsonl", "text").keep("b.jsonl:1", spans((30, "text", 1.0)))
    reason = "Off, though there is plain text: batches are padded: --padding_free False"
    assert f"{reason}." in render_report(report, color=False) and report.describe_packing() == reason
    report.settings = ReportSettings(packing=False)  # as was asked for
    assert report.describe_packing() == ""


def test_sources_of_which_nothing_is_drawn_are_named() -> None:
    report = DataReport("train", ReportSettings())
    report.add_source("a.txt@x0.3", "text", 1)
    assert report.problems() == ["none of 1 records is left: --eval_split holds out, or #N and @xF leave out, all"]
    report.add_source("b.json", "messages", 1).keep("b.json:1", exchange(10, 20))
    assert report.warnings() == ["a.txt@x0.3: none of its 1 records is used for this set"]


def test_dropped_items_are_named_and_do_not_count_in_steps() -> None:
    report = report_of_lengths([5] * 8, batch_size=3, drop_last=True)
    assert report.steps() == (2, 2)
    assert report.warnings() == [
        "--dataloader_drop_last leaves out 2 of 8 samples in each epoch, which do not fill a batch of 3"
    ]
    report = report_of_lengths([5] * 8, batch_size=2, accumulation=3, world_size=1, drop_last=True)
    assert report.steps() == (2, 2) and report.warnings() == []
