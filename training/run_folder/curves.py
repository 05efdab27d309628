"""``training_log.jsonl`` as rows, and the loss curve. Imports neither torch nor transformers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints.names import TRAINING_LOG
from errors import DataError
from outputs import staged_file

Row = dict[str, Any]


def load_rows(path: Path, *, strict: bool = True) -> list[Row]:
    """Return the rows of a log without an incomplete last line, which is being written or was cut off by a crash.

    Args:
        strict: ``False`` drops all rows from the first broken line on.

    Raises:
        DataError: a line is not a row of a log.
    """
    rows: list[Row] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif not strict or not line.endswith("\n"):
            break
        else:
            raise DataError(f"{path}:{number}", "not a line of a training log", f"Give a run's {TRAINING_LOG}")
    return rows


def plot_losses(runs: Mapping[str, Sequence[Row]], path: Path, title: str = "Loss") -> None:
    """Plot the losses of runs over optimizer steps: a colour per run, training solid and evaluation dashed.

    Args:
        runs: the rows of each run by its name; the name of a single run may be empty.
        path: the picture; its suffix decides the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, (run, rows) in enumerate(runs.items()):
        for name, kind, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "--")):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                marker = "o" if len(points) == 1 else "." if len(points) < 50 else None
                label = f"{run}, {kind}" if run else kind
                colour = f"C{number}" if run else None  # the two curves of a single run differ in colour too
                axes.plot(*zip(*points, strict=True), style, color=colour, label=_plain(label), marker=marker)
    axes.set_title(_plain(title))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per target)")
    axes.ticklabel_format(style="plain", useOffset=False)  # 12.01, not 0.01 and "+1.2e1" beside the axis
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if axes.lines:
        axes.legend()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a character that the font of the picture lacks
            with staged_file(path) as staging:
                figure.savefig(staging, dpi=120)
    finally:
        pyplot.close(figure)


def _plain(text: str) -> str:
    """Return a name as it stands in a picture: matplotlib would read formulas between dollar signs."""
    return text.replace("$", r"\$").encode("utf-8", "replace").decode()
