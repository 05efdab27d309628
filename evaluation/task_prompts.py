"""Prompts of the known benchmarks, as the original evaluation of Qwen writes them, and what counts as right.

A prompt has solved examples before the question. A choice is made by the likelihoods of the four letters behind the
prompt; other answers are written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from errors import ConfigError, DataError
from evaluation.task_files import LETTERS, Question, Subject


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is asked.

    Attributes:
        title: with what it asks for.
        shots: examples in a prompt.
        score: name of its figure.
        by_subject: its mean is that of the subjects' means, not of all questions.
        separator: text between the prompt and a letter.
        stops: texts that end an answer which continues a prompt without a chat format.
    """

    title: str
    shots: int
    score: str = "accuracy"
    by_subject: bool = False
    separator: str = ""
    stops: tuple[str, ...] = ()


BENCHMARKS = {
    "ceval": Benchmark("C-Eval: Chinese examinations, four choices", 5, by_subject=True),
    "cmmlu": Benchmark("CMMLU: knowledge in Chinese, four choices", 5, by_subject=True),
    "mmlu": Benchmark("MMLU: knowledge in English, four choices", 5, separator=" "),
    "gsm8k": Benchmark("GSM8K: arithmetic word problems", 8, stops=("\n\n", "Question:")),
    # Of the benchmark's authors: what follows the function is not part of it.
    "humaneval": Benchmark(
        "HumanEval: Python functions that pass tests", 0, "pass@1",
        stops=("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A question as a model is asked.

    Attributes:
        where: file and line of the question.
        subject: its subject, whose examples the prompt has.
        asked: the question without examples.
        prompt: with them.
        expected: the letter, the number, or the function's body.
        choices: what may follow the prompt, the letters; empty if the answer is written.
        fields: of the question.
    """

    where: str
    subject: str
    asked: str
    prompt: str
    expected: str
    choices: tuple[str, ...]
    fields: dict[str, str]


def build_items(
    name: str, subjects: Sequence[Subject], shots: int | None, limit: int | None, seed: int, is_chat: bool
) -> list[Item]:
    """Return the questions of a benchmark with their prompts.

    Args:
        shots: examples in a prompt; ``None``: as the benchmark is published.
        limit: most questions, drawn by the seed from all subjects.
        is_chat: each prompt will be the message of a user.

    Raises:
        ConfigError: fewer examples than a prompt needs.
        DataError: a question without its answer.
    """
    count = BENCHMARKS[name].shots if shots is None else shots
    build = {"gsm8k": _arithmetic, "humaneval": _function}.get(name, _choice)
    items = []
    for subject in subjects:
        if len(subject.examples) < count:
            what = f"--num_fewshot {count}: {name} has {len(subject.examples)} examples of {subject.name}"
            raise ConfigError(what, "Give fewer, or copy the benchmark's files again")
        items += build(name, subject, subject.examples[:count], is_chat)
    if limit is not None and limit < len(items):
        drawn = set(Random(f"{seed} {name}").sample(range(len(items)), limit))
        items = [item for index, item in enumerate(items) if index in drawn]
    return items


# ------------------------------------------------------------------------------------------------------------ choices


def _choice(name: str, subject: Subject, examples: Sequence[Question], is_chat: bool) -> list[Item]:
    separator = "" if is_chat else BENCHMARKS[name].separator
    intro = ""
    if name == "mmlu":
        topic = subject.name.replace("_", " ")
        intro = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
    between = BENCHMARKS[name].separator
    solved = "".join(f"{_asked(name, each)}{between}{each.fields['answer']}\n\n" for each in examples)
    items = []
    for question in subject.questions:
        asked = _asked(name, question)
        choices = tuple(f"{separator}{letter}" for letter in LETTERS)
        prompt = f"{intro}{solved}{asked}"
        items.append(
            Item(question.where, subject.name, asked, prompt, question.fields["answer"], choices, question.fields)
        )
    return items


def _asked(name: str, question: Question) -> str:
    before, after = ("Question: ", "Answer:") if name == "mmlu" else ("问题：", "答案：")
    choices = "".join(f"{letter}. {question.fields[letter]}\n" for letter in LETTERS)
    return f"{before}{question.fields['question']}\n{choices}{after}"


# --------------------------------------------------------------------------------------------------------- arithmetic

_RESULT = re.compile(r"#### *(-?[\d.,]+)")
_NOTE = re.compile(r"<<[^>]*>>")  # the benchmark's marks for a calculator
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_STEPS = "Let's think step by step"


def _arithmetic(name: str, subject: Subject, examples: Sequence[Question], is_chat: bool) -> list[Item]:
    solved = ""
    for example in examples:
        steps, _, _ = _NOTE.sub("", example.fields["answer"]).partition("\n####")
        result = _result(example)
        solved += f"Question: {example.fields['question']}\n{_STEPS}\n{steps}\nThe answer is {result}\n\n"
    items = []
    for question in subject.questions:
        asked = question.fields["question"]
        prompt = f"{solved}Question: {asked}\n{_STEPS}\n"
        items.append(Item(question.where, subject.name, asked, prompt, _result(question), (), question.fields))
    return items


def _result(question: Question) -> str:
    found = _RESULT.search(question.fields["answer"])
    if found is None:
        raise DataError(
            question.where, "the answer does not end with #### and a number", "Copy the file of gsm8k again"
        )
    return found[1].replace(",", "").rstrip(".")


def is_right_number(answer: str, expected: str) -> bool:
    """Return whether the last number of an answer is the expected one."""
    numbers = _NUMBER.findall(answer)
    return bool(numbers) and float(numbers[-1].replace(",", "")) == float(expected)


# ---------------------------------------------------------------------------------------------------------- functions

_BLOCK = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def _function(name: str, subject: Subject, examples: Sequence[Question], is_chat: bool) -> list[Item]:
    items = []
    for question in subject.questions:
        asked = question.fields["prompt"]
        request = "Complete this Python function. Answer with the whole function in one block of code.\n\n"
        prompt = f"{request}{asked}" if is_chat else asked
        expected = question.fields.get("canonical_solution", "")
        items.append(Item(question.where, subject.name, asked, prompt, expected, (), question.fields))
    return items


def program_of(fields: dict[str, str], answer: str, is_chat: bool) -> str:
    """Return the program that raises nothing if an answer is right: the function, then the benchmark's tests of it.

    Args:
        fields: of the question.
        answer: continues the prompt, or is an answer to it, whose block of code has the function.
    """
    function = fields["prompt"] + answer
    if is_chat:
        blocks = _BLOCK.findall(answer) or [answer]
        named = f"def {fields['entry_point']}("
        code = next((block for block in blocks if named in block), None)
        # What the prompt imports and defines stays; its function is defined again.
        function = fields["prompt"] + blocks[0] if code is None else f"{fields['prompt']}    pass\n\n{code}"
    return f"{function}\n{fields['test']}\ncheck({fields['entry_point']})\n"


Judge = Callable[[Item, str], bool]
"""Returns whether a written answer to a question is right."""
