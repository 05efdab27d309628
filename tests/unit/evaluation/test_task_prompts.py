"""Prompts of the benchmarks to the letter, and what counts as a right answer."""

from __future__ import annotations

import pytest

from evaluation.task_files import read_subjects
from evaluation.task_prompts import Item, build_items, is_right_number, program_of
from tests.golden import REPO

BENCHMARKS = REPO / "tests" / "references" / "benchmarks"


def items(name: str, shots: int | None = None, limit: int | None = None, is_chat: bool = False) -> list[Item]:
    return build_items(name, read_subjects(name, BENCHMARKS), shots, limit, 0, is_chat)


def test_mmlu_has_its_subject_and_examples_before_the_question() -> None:
    arithmetic = items("mmlu", shots=1)[2]
    assert arithmetic.prompt == (
        "The following are multiple choice questions (with answers) about plain arithmetic.\n\n"
        "Question: What is 2 + 3?\nA. 4\nB. 5\nC. 6\nD. 7\nAnswer: B\n\n"
        "Question: What is 4 + 4?\nA. 6\nB. 7\nC. 8\nD. 9\nAnswer:"
    )
    assert (arithmetic.choices, arithmetic.expected) == ((" A", " B", " C", " D"), "C")
    assert items("mmlu")[0].prompt.count("Answer: ") == 5
    assert items("mmlu", is_chat=True)[0].choices == ("A", "B", "C", "D")  # an answer begins with its letter


@pytest.mark.parametrize("name", ["ceval", "cmmlu"])
def test_chinese_choices_have_no_space_before_the_letter(name: str) -> None:
    first = items(name)[0]
    assert first.prompt.count("答案：") == 6 and first.prompt.endswith("\n答案：") and "Answer" not in first.prompt
    assert first.prompt.startswith("问题：") and "\n\n问题：" in first.prompt and first.choices == ("A", "B", "C", "D")
    assert items(name, shots=0)[0].prompt == first.asked


def test_examples_of_gsm8k_are_steps_and_an_answer() -> None:
    first = items("gsm8k", shots=4)[0]
    assert first.prompt.endswith(
        "Question: A train has 1200 seats and 200 are free. How many are taken?\nLet's think step by step\n"
        "1200 - 200 = 1000 seats are taken.\nThe answer is 1000\n\n"
        "Question: Ben has 6 marbles and loses 2. How many are left?\nLet's think step by step\n"
    )
    assert "<<" not in first.prompt and "####" not in first.prompt
    assert items("gsm8k")[0].prompt.count("The answer is ") == 8 and items("gsm8k")[1].expected == "3000"


@pytest.mark.parametrize(
    ("answer", "expected", "is_right"),
    [
        ("3 + 1 = 4.\nThe answer is 4.", "4", True),
        ("The answer is 4\n\nThat is 5", "4", False),
        ("It costs $3,000.", "3000", True),
        ("It is -3.0", "-3", True),
        ("2.50", "2.5", True),
        ("four", "4", False),
        ("", "4", False),
    ],
)
def test_the_last_number_counts(answer: str, expected: str, is_right: bool) -> None:
    assert is_right_number(answer, expected) is is_right


def test_a_limit_draws_the_same_questions_from_all_subjects() -> None:
    drawn = items("mmlu", limit=3)
    assert drawn == items("mmlu", limit=3) and [each for each in items("mmlu") if each in drawn] == drawn
    assert len(drawn) == 3 and items("mmlu", limit=99) == items("mmlu")


def test_a_program_is_the_prompt_the_answer_and_the_tests() -> None:
    fields = {
        "prompt": "import math\n\ndef f(x):\n    '''Doc'''\n",
        "test": "def check(g): assert g(1)",
        "entry_point": "f",
    }
    assert program_of(fields, "    return x", False) == (
        "import math\n\ndef f(x):\n    '''Doc'''\n    return x\ndef check(g): assert g(1)\ncheck(f)\n"
    )
    block = "def f(x):\n    return math.pi\n"
    in_chat = program_of(fields, f"Sure:\n```python\n{block}```\nIt returns pi, ``` say.", True)
    assert in_chat == f"{fields['prompt']}    pass\n\n{block}\n{fields['test']}\ncheck(f)\n"
    assert program_of(fields, "```\n    return x\n```", True) == program_of(fields, "    return x\n", False)
