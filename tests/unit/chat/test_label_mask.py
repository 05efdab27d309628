"""Weights and labels of ``chat.label_mask``: the picture in its docstring, and the conversion to labels."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from chat import label_mask
from chat.chatml import IM_END, IM_START
from chat.families import QWEN_V1
from chat.label_mask import LabelMask, frame_weights, labels_from_weights, turn_weights
from chat.render import render
from chat.turns import Turn

CONVERSATION = (
    Turn("system", "Be brief."),
    Turn("user", "1+1?"),
    Turn("assistant", "2"),
    Turn("user", "2+2?"),
    Turn("assistant", "4"),
)


def picture() -> dict[str, str]:
    """Return the rows of the picture in the module's docstring by their names."""
    rows = re.findall(r"^    (conversation|assistant|last|qwen|all) +(.*)$", label_mask.__doc__ or "", re.MULTILINE)
    return dict(rows)


def test_picture_has_a_row_for_every_mask() -> None:
    assert picture().keys() == {"conversation", *get_args(LabelMask)}


@pytest.mark.parametrize("mask", get_args(LabelMask))
def test_picture_shows_which_pieces_are_trained(mask: LabelMask) -> None:
    rows = picture()
    column = 0
    shorthand = {IM_START: "S", f"{IM_END}\n": "E"}
    for message in render(CONVERSATION, QWEN_V1, label_mask=mask):
        start, header, text, end, newline = message.segments
        assert end.weight == newline.weight
        for segment in (start, header, text, end._replace(text=end.text + newline.text)):
            piece = shorthand.get(segment.text, segment.text.replace("\n", r"\n"))
            column = rows["conversation"].index(piece, column)
            expected = piece if segment.weight else "."
            assert rows[mask][column:].startswith(expected), (mask, piece)
            column += len(piece)


def test_own_weight_overrides_every_mask() -> None:
    turns = [Turn("user", "a", weight=0.5), Turn("assistant", "b", weight=0.0), Turn("assistant", "c")]
    assert turn_weights(turns, "assistant", {1, 2}) == [0.5, 0, 1]
    assert turn_weights(turns, "all", set()) == [0.5, 0, 1]
    assert turn_weights(turns, "last", {1}) == [0.5, 0, 0]
    assert frame_weights(0.5, 0.5, "qwen", awaits_result=False) == (0.5, 0, 0.5)
    assert frame_weights(0.0, 0.0, "all", awaits_result=False) == (0, 0, 0)


def test_end_of_a_message_that_awaits_a_result_is_not_trained() -> None:
    assert frame_weights(None, 1.0, "all", awaits_result=True) == (1, 1, 0)


def test_labels_are_the_ids_where_the_weight_is_not_zero() -> None:
    assert labels_from_weights([5, 6, 7, 8], [(1, 0.0), (2, 0.5), (1, 0.0)]) == [-100, 6, 7, -100]
    assert labels_from_weights([], []) == []
    with pytest.raises(AssertionError):
        labels_from_weights([5, 6], [(1, 1.0)])
