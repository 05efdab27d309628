"""python -m scripts.plot_runs: the losses of several runs in one plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.plot_runs import main
from tests.commands import run_here, run_well
from training.run_folder.curves import load_rows

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder: Path, losses: list[float], eval_losses: dict[int, float] | None = None) -> Path:
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    rows += [{"step": step, "eval_loss": loss} for step, loss in (eval_losses or {}).items()]
    (folder / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of every figure that is saved."""
    drawn: list[Axes] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.extend(figure.axes)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn


def test_training_is_solid_and_evaluation_dashed_in_one_colour_per_run(tmp_path: Path, axes: list[Axes]) -> None:
    a = write_run(tmp_path / "a", [3.0, 2.0, 1.0], {2: 2.5, 3: 1.5})
    b = write_run(tmp_path / "b", [4.0, 3.5])
    main([str(a), str(b / "training_log.jsonl"), "--output", str(tmp_path / "both.png")])
    [drawn] = axes
    lines = [(line.get_label(), line.get_linestyle(), line.get_color()) for line in drawn.lines]
    assert lines == [("a, training", "-", "C0"), ("a, evaluation", "--", "C0"), ("b, training", "-", "C1")]
    points = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in drawn.lines]
    assert points == [[(1, 3.0), (2, 2.0), (3, 1.0)], [(2, 2.5), (3, 1.5)], [(1, 4.0), (2, 3.5)]]
    legend = drawn.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == [label for label, _, _ in lines]
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)


def test_equal_folder_names_are_extended_until_unique(tmp_path: Path, axes: list[Axes]) -> None:
    runs = [write_run(tmp_path / name / "out", [1.0]) for name in ("small", "large")]
    main([*map(str, runs), "--output", str(tmp_path / "both.png")])
    assert [line.get_label() for line in axes[0].lines] == ["small/out, training", "large/out, training"]


def test_command(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [3.0, 2.0])
    picture = tmp_path / "a.png"
    result = run_well("-m", "scripts.plot_runs", tmp_path / "a", "--output", picture)
    assert result.stdout == f"1 run: {picture}\n" and picture.read_bytes().startswith(PNG)


def test_incomplete_last_line_of_a_log_is_ignored(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", [3.0, 2.0]) / "training_log.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert [row["step"] for row in load_rows(path)] == [1, 2]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run_here(main, "scripts.plot_runs", arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err.removeprefix("scripts.plot_runs: error: ").rstrip("\n")


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_run(tmp_path / "good", [1.0])
    empty = write_run(tmp_path / "empty", [])
    broken = write_run(tmp_path / "broken", [1.0])
    broken.joinpath("training_log.jsonl").write_text('{"step": 1, "loss": 1.0}\nno json\n{"step": 2, "loss": 1.0}\n')
    other = tmp_path / "other"
    other.mkdir()
    picture = tmp_path / "x.png"

    def message(*runs: Path, output: Path = picture) -> str:
        return refused(capsys, *runs, "--output", output)

    assert (
        message(tmp_path / "none") == f"{tmp_path}/none: no such file or folder. Give the output folder of finetune.py"
    )
    assert message(good, other) == (
        f"{other}: the folder contains no training_log.jsonl. Give the output folder of finetune.py"
    )
    assert message(good, broken) == (
        f"{broken}/training_log.jsonl:2: not a line of a training log. Give a run's training_log.jsonl"
    )
    assert message(empty) == (
        f"{empty}/training_log.jsonl: no loss was logged. Give a run with at least one logged step"
    )
    assert not picture.exists()
    nowhere = tmp_path / "nowhere" / "x.png"
    assert message(good, output=nowhere).startswith(f"--output {nowhere}: ")
    assert message(good, output=tmp_path / "x.docx").startswith(f"--output {tmp_path}/x.docx: ")
    assert "RUN" in refused(capsys)
