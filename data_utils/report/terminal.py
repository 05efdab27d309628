"""A data report as text for the terminal: samples with their trained tokens marked, then tables, then problems."""

from __future__ import annotations

from collections.abc import Sequence

from console import visible
from data_utils.report.counts import counted
from data_utils.report.data_report import DataReport
from data_utils.report.padding import STRATEGIES
from data_utils.report.samples import visible_line
from data_utils.report.source_report import SourceReport
from data_utils.report.terminal_text import (
    CLOSE,
    DIM,
    LINE_END,
    OPEN,
    RED,
    TRAINED,
    YELLOW,
    Painter,
    heading,
    sample_lines,
    wrap,
)

_BAR = 30


def render_report(report: DataReport, *, color: bool, width: int = 100) -> str:
    """Render a report as lines of at most ``width`` columns, except for longer single words; 60 columns are enough.

    Control characters in the user's text are replaced by visible ones.
    """
    paint = Painter(color)
    width = max(width, 40)
    parts = [_what_is_trained(report, paint, width)]
    for number, sample in enumerate(report.samples, 1):
        parts.append(sample_lines(sample, f"Sample {number} of {len(report.samples)}", paint, width))
    total = report.total()
    parts.append(_sources(report, total, paint, width))
    if answers := report.describe_answers():
        parts.append([*heading("Answers", paint, width), *wrap(" ".join(answers), width)])
    if total.kept:
        parts += [_lengths(total, paint, width), _roles(total, paint, width), _padding(report, paint, width)]
    if packing := report.describe_packing():
        parts.append([*heading("Packing", paint, width), *wrap(f"{packing}.", width)])
    if total.kept and report.name == "train":
        parts.append([*heading("Optimizer steps", paint, width), *wrap(report.describe_steps(), width)])
    parts.append(_findings(report, paint, width))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _what_is_trained(report: DataReport, paint: Painter, width: int) -> list[str]:
    settings = report.settings
    checkpoint = f"{visible_line(settings.model)} ({settings.family}): " if settings.model else ""
    lines = wrap(visible_line(checkpoint + settings.data_flags(", "), 400), width)
    if report.samples:
        example = paint(TRAINED, "trained") if paint.color else f"{OPEN}trained{CLOSE}"
        legend = [f"{example}, not trained", f"{LINE_END} newline"]
        pieces = [piece for sample in report.samples for piece in sample.pieces]
        if any(piece.weight not in (0, 1) for piece in pieces):
            legend.append("(x0.5) weight in the loss, if not 1")
        if any("<|" in piece.text for piece in pieces if piece.kind == "text"):
            legend.append("<\\| text of a message, not a control token")
        lines += ["", *wrap("; ".join(legend), width)]
    return [*heading("What is trained", paint, width), *lines]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return right-aligned columns, the first line with their heads."""
    sizes = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    return ["  ".join(f"{value:>{size}}" for value, size in zip(row, sizes, strict=True)) for row in (heads, *rows)]


def _sources(report: DataReport, total: SourceReport, paint: Painter, width: int) -> list[str]:
    heads = ("in file", "read", "kept", "skipped", "shortened", "duplicates", "tokens", "trained")
    names = [f"{visible_line(source.name)} ({visible_line(source.format)})" for source in report.sources] + ["all"]
    rows = []
    for source in [*report.sources, *([total] if len(report.sources) != 1 else [])]:
        counts = (source.in_file, source.read, source.kept, source.skipped.total, source.truncated.total)
        numbers = (*counts, source.duplicates.total, source.tokens)
        rows.append((*(f"{number:,}" for number in numbers), _share(source.trained_tokens, source.tokens)))
    table = _table(heads, rows)
    fits = len(table[0]) <= width
    lines = heading(f"Data ({visible_line(report.name)})", paint, width)
    if fits:
        lines.append(paint(DIM, table[0]))
    for name, row, line in zip(names, rows, table[1:], strict=False):
        lines += wrap(name, width)
        if fits:
            lines.append(line)
        else:
            # "300 read, 287 kept": no line break between a number and its name.
            pairs = ", ".join(f"{value} {head}".replace(" ", "\u00a0") for head, value in zip(heads, row, strict=True))
            lines += [line.replace("\u00a0", " ") for line in wrap(f"  {pairs}", width, "  ")]
    if more := total.samples - total.split_samples - (total.kept - total.split):
        what = f"{counted(total.kept, total.noun)} and {counted(more, 'more samples')}"
        lines += wrap(f"{what}: texts longer than --model_max_length are cut", width)
    return lines


def _lengths(total: SourceReport, paint: Painter, width: int) -> list[str]:
    summary = {name: f"{value:,}" for name, value in total.length_summary().items()}
    size = max(map(len, [*summary, *summary.values()]))
    lines = heading("Tokens per sample", paint, width)
    names = list(summary)
    per_line = max(1, width // (size + 2))
    for start in range(0, len(names), per_line):
        row = names[start : start + per_line]
        lines.append(paint(DIM, "  ".join(f"{name:>{size}}" for name in row)))
        lines.append("  ".join(f"{summary[name]:>{size}}" for name in row))
    return lines


def _roles(total: SourceReport, paint: Painter, width: int) -> list[str]:
    roles = [*sorted(total.tokens_by_role), "all"]
    counts = [(total.tokens_by_role[role], total.trained_by_role[role]) for role in roles[:-1]]
    counts.append((total.tokens, total.trained_tokens))
    rows = [
        (f"{tokens:,}", f"{trained:,}", _share(trained, tokens), _share(trained, total.trained_tokens))
        for tokens, trained in counts
    ]
    table = _table(("tokens", "trained", "share", "of all trained"), rows)
    named = [f"{line}  {visible_line(role, 20)}" for line, role in zip(table[1:], roles, strict=True)]
    lines = [*heading("Trained tokens by role", paint, width), paint(DIM, table[0]), *named]
    if total.trained_weight != total.trained_tokens:
        lines.append(f"The sum of their weights in the loss is {total.trained_weight:,.6g}.")
    return lines


def _padding(report: DataReport, paint: Painter, width: int) -> list[str]:
    settings = report.settings
    lines = heading(f"Padding as a share of all positions, batches of {settings.batch_size}", paint, width)
    bar = min(_BAR, width - 24)
    for strategy, share in report.padding().items():
        filled = "█" * round(share * bar)
        note = "this run: " if strategy == settings.batching else ""
        if width >= 60 + bar:
            note += STRATEGIES[strategy]
        line = f"{strategy:<8}{share:>7.1%}  {paint(YELLOW, filled)}{paint(DIM, '░' * (bar - len(filled)))}"
        lines.append(f"{line}  {note}".rstrip(" :"))
    return lines


def _findings(report: DataReport, paint: Painter, width: int) -> list[str]:
    problems, warnings = report.problems(), report.warnings()
    if not problems and not warnings:
        return ["No problems found."]
    lines = []
    for style, name, texts in ((YELLOW, "warning", warnings), (RED, "PROBLEM", problems)):
        for text in texts:
            first, *others = wrap(f"{name}: {visible(text)}".replace("\n", " "), width, "  ")
            lines += [paint(style, first[: len(name)]) + first[len(name) :], *others]
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
