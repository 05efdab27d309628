"""Scores of answers, on cases computed by hand and on values of rouge-score 0.1.2 and sacrebleu 2.6.0."""

from __future__ import annotations

import pytest

from chat.turns import ToolCall
from evaluation.metrics import Reply, chrf, mean_scores, rouge_l, score_answer, words_of


def call(arguments: object, name: str = "find") -> ToolCall:
    return ToolCall(name, arguments)


@pytest.mark.parametrize(
    ("expected", "given", "score"),
    [
        ("Paris", "Paris", 1),
        (" Paris is\n big ", "Paris  is big", 1),
        ("你好\u3000世界", "你好 世界", 1),  # an ideographic space is white space
        ("Paris", "paris", 0),
        ("", "", 1),
        ("", "x", 0),
        ("x", " \n", 0),
    ],
)
def test_exact_match_ignores_white_space_alone(expected: str, given: str, score: int) -> None:
    assert score_answer(Reply(expected), Reply(given))["exact_match"] == score


@pytest.mark.parametrize(
    ("expected", "given", "score"),
    [
        # Of rouge-score. The first is by hand, too: 5 common words in order, of 9 and 8.
        ("The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log.", 10 / 17),
        ("Water boils at 100 degrees.", "At sea level water boils at 100 °C.", 8 / 13),
        # By hand: 4 common characters of 6 and 6, and of 5 and 3.
        ("天上有白云。鸟", "天上白云飞，人", 8 / 12),
        ("你好 world", "好, World!", 2 * 2 / (3 + 2)),
        ("a b c d", "d c b a", 2 * 1 / 8),
        ("same", "other", 0),
        ("", "", 1),
        ("", "word", 0),
        ("...", "...", 1),
        ("...", "?", 0),
    ],
)
def test_rouge_l(expected: str, given: str, score: float) -> None:
    assert rouge_l(expected, given) == pytest.approx(score)


@pytest.mark.parametrize(
    ("expected", "given", "score"),
    [
        # Of sacrebleu: sentence_chrf.
        ("The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log.", 0.525324471643681),
        ("你好，你是谁？", "你好，谁是你？", 0.25555555555555554),
        ("Water boils at 100 degrees.", "At sea level water boils at 100 °C.", 0.566667321683361),
        # By hand. One character of two is common, no pair: precision = recall = (1/2 + 0) / 2.
        ("ab", "ac", 0.25),
        # Both characters of two, and their pair, but twice as many are given: precision (2/4 + 1/3) / 2, recall 1.
        ("ab", "a bcc", 5 * (5 / 12) / (4 * (5 / 12) + 1)),
        ("a b c", "abc", 1),
        ("ab", "cd", 0),
        ("", "", 1),
        ("", "x", 0),
    ],
)
def test_chrf(expected: str, given: str, score: float) -> None:
    assert chrf(expected, given) == pytest.approx(score)


def test_words_are_separated_by_script() -> None:
    assert words_of("Hello天地world, don't 3.5 ÉTÉ ひと") == [
        "hello", "天", "地", "world", "don", "t", "3", "5", "été", "ひ", "と",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("expected", "given", "score"),
    [
        ("Paris", "It is paris.", 1), ("北京", "中国的首都是北京。", 1), ("New York", "York, new", 0),
        ("a b", "a, b c", 1),         ("9", "19", 0), ("", "anything", 1), ("word", "", 0),
    ],
)  # fmt: skip
def test_contains(expected: str, given: str, score: int) -> None:
    assert score_answer(Reply(expected), Reply(given))["contains"] == score


@pytest.mark.parametrize(
    ("given", "name", "arguments"),
    [
        ([call('{"b": [1, true], "a": "天"}')], 1, 1),
        ([call({"a": "天", "b": [1.0, True]})], 1, 1),
        ([call('{"a": "天", "b": [1, 1]}')], 1, 0),  # true is not 1
        ([call('{"a": "天"}')], 1, 0),
        ([call('{"a": "天", "b": [1, true]')], 1, 0),  # no JSON
        ([call('{"a": "天", "b": [1, true]}', "search")], 0, 0),
        ([call('{"a": "天", "b": [1, true]}'), call("{}")], 0, 0),
        ([], 0, 0),
    ],
)
def test_calls_are_compared_as_json_values(given: list[ToolCall], name: int, arguments: int) -> None:
    scores = score_answer(Reply("", (call('{"a": "天", "b": [1, true]}'),)), Reply("", tuple(given)))
    assert (scores["call_name"], scores["call_arguments"]) == (name, arguments)
    assert "valid_json" not in scores
    assert scores["exact_match"] == arguments


def test_arguments_that_are_no_json_are_compared_as_text() -> None:
    expected = Reply("", (call("city: Paris"),))
    assert score_answer(expected, Reply("", (call("city:  Paris"),)))["call_arguments"] == 1
    assert score_answer(expected, Reply("", (call('{"city": "Paris"}'),)))["call_arguments"] == 0
    deep = Reply("", (call("[" * 5000 + "]" * 5000),))
    assert score_answer(expected, deep)["call_arguments"] == 0


@pytest.mark.parametrize(
    ("expected", "given", "score"),
    [('{"a": 1}', '[2, "天"]', 1), ("[1]", "[1,]", 0), ("[1]", "", 0), ("[1]", "[NaN]", 0), ("[1]", "```[1]```", 0)],
)
def test_json_is_checked_where_it_is_expected(expected: str, given: str, score: int) -> None:
    assert score_answer(Reply(expected), Reply(given))["valid_json"] == score
    assert "valid_json" not in score_answer(Reply("12 and more"), Reply(given))
    assert "valid_json" not in score_answer(Reply("12"), Reply(given))  # a number is a text, too


def test_mean_is_over_the_answers_that_have_a_score() -> None:
    rows = [{"exact_match": 1.0, "valid_json": 1.0}, {"exact_match": 0.0}, {"exact_match": 0.5, "valid_json": 0.0}]
    assert mean_scores(rows) == {"exact_match": 0.5, "valid_json": 0.5}
    assert mean_scores([]) == {}
