"""Flags as data, and the conversion of their values."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from tests.golden import REPO
from training.config.flags import Flag, flag_of, nearest
from training.config.trainer_flags import transformers_flags


def test_parsing_and_checking_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from training.config.parsing import parse_args; from training.checks import check_args; "
        "args = parse_args(['--use_lora', '--bf16', '--model_name_or_path', 'none', '--max_steps', '1']); "
        "args.output_dir, args.to_dict(); print([name for name in ('torch', 'transformers', 'numpy') "
        "if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


BOOL = flag_of("switch", "bool", False)
INT, FLOAT, STR = flag_of("count", "int", 1), flag_of("rate", "float", 1.0), flag_of("name", "str", "")
MAYBE, NAMES = flag_of("steps", "float | None"), flag_of("layers", "list[str] | None")
PACK = flag_of("pack", "bool | Literal['auto']", "auto")
CHOICE = flag_of("mask", "Literal['assistant', 'qwen']", "qwen")
OBJECT = flag_of("options", "dict[str, Any] | str | None")


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        (BOOL, "True", True), (BOOL, "false", False), (BOOL, "yes", True), (BOOL, "0", False), (BOOL, True, True),
        (INT, "-3", -3), (INT, 8, 8), (FLOAT, "3e-4", 3e-4), (FLOAT, 2, 2.0), (STR, "5", "5"), (STR, "", ""),
        (STR, True, "True"), (MAYBE, None, None), (MAYBE, "none", None), (MAYBE, "0.5", 0.5),
        (NAMES, ["a", "b"], ["a", "b"]), (NAMES, ["a"], ["a"]), (NAMES, "a", ["a"]), (NAMES, None, None),
        (PACK, "auto", "auto"), (PACK, "true", True), (PACK, False, False),
        (CHOICE, "assistant", "assistant"), (OBJECT, '{"a": [1, true]}', {"a": [1, True]}),
        (OBJECT, {"b": 1}, {"b": 1}), (flag_of("seen", "str | bool", "no"), "no", "no"),
        (OBJECT, "config.json", "config.json"),
    ],
)  # fmt: skip
def test_valid_values_are_converted(flag: Flag, value: Any, expected: Any) -> None:
    converted = flag.convert(value)
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        (PACK, "maybe", "expected one of auto, true, false"),
        (BOOL, "perhaps", "expected true or false"), (BOOL, 1, "expected true or false"),
        (BOOL, None, "expected true or false"), (INT, "many", "expected a whole number"),
        (INT, "1.5", "expected a whole number"), (INT, 2.0, "expected a whole number"),
        (INT, True, "expected a whole number"), (INT, [1], "expected a whole number"),
        (FLOAT, "fast", "expected a number"), (FLOAT, math.nan, "expected a number"),
        (FLOAT, "inf", "expected a number"), (STR, 5, "expected a string"), (STR, ["a"], "expected a string"),
        (CHOICE, "user", "expected one of assistant, qwen"),
        (CHOICE, "asistant", "expected one of assistant, qwen (did you mean assistant?)"),
        (NAMES, [1], "expected a list of strings"), (NAMES, 7, "expected a list of strings"),
        (OBJECT, '{"a": ', "not JSON (Expecting value: line 1 column 7 (char 6))"),
    ],
)  # fmt: skip
def test_invalid_values_are_refused(flag: Flag, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        flag.convert(value)
    assert str(caught.value) == message


def test_nearest_name() -> None:
    assert nearest("xyzzy", transformers_flags()) is None
    assert nearest("lerning_rate", transformers_flags()) == "learning_rate"
