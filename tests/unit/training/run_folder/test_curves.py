"""The picture of a run's losses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from training.run_folder.curves import plot_losses

NEARLY_EQUAL = [{"step": step, "loss": 12.01 + step / 1e5} for step in range(1, 61)]


def drawn(monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: Any) -> Any:
    """Return the axes of the picture that is written to ``path``."""
    from matplotlib import pyplot

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(pyplot, "close", lambda figure: None)
        plot_losses(arguments[0], path, *arguments[1:])
        [axes] = pyplot.gcf().axes
    pyplot.close(axes.figure)
    assert path.read_bytes().startswith(b"\x89PNG")
    return axes


def test_the_numbers_of_the_axes_are_the_losses_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib would write 0.0001 and "+1.201e1" beside the axis."""
    axes = drawn(monkeypatch, tmp_path / "a.png", {"": NEARLY_EQUAL}, "Loss of 微调 $x")
    for axis in (axes.xaxis, axes.yaxis):
        assert axis.get_offset_text().get_text() == ""
        low, high = axis.get_view_interval()
        values = [
            (text.get_text(), place) for text, place in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
        ]
        assert [float(text.replace("−", "-")) for text, _ in values] == pytest.approx([place for _, place in values])
        assert low < high
    assert all(text.get_text().isdigit() for text in axes.xaxis.get_ticklabels() if not text.get_text().startswith("−"))
    assert axes.get_title() == r"Loss of 微调 \$x"


def test_training_and_evaluation_share_one_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 3.0}, {"step": 2, "eval_loss": 11.0}]
    axes = drawn(monkeypatch, tmp_path / "a.png", {"": rows})
    assert [line.get_label() for line in axes.lines] == ["training", "evaluation"]
    low, high = axes.get_ylim()
    assert low < 3 and high > 11
    assert len(axes.figure.axes) == 1


def test_a_single_point_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(monkeypatch, tmp_path / "a.png", {"": [{"step": 1, "loss": 2.5}]})
    [line] = axes.lines
    assert line.get_marker() == "o" and line.get_label() == "training"
    assert axes.get_legend() is not None
    drawn(monkeypatch, tmp_path / "b.png", {"": []})
