"""Draw a conversation as an SVG file with its trained tokens marked: ``python -m scripts.draw_masks``.

Draws what ``chat/`` renders for Qwen v1 for some values of ``--label_mask``; docs/trained_tokens.svg is its output.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import get_args

from chat.families import QWEN_V1
from chat.label_mask import LabelMask
from chat.render import render
from chat.segments import Segment
from chat.turns import Turn
from checkpoints.files import save_text
from commands import CommandParser, run_command
from console import show
from outputs import check_output_file, parse_output

CONVERSATION = [
    Turn("user", "Who are you?"),
    Turn("assistant", "I am Linden."),
    Turn("user", "Who made you?"),
    Turn("assistant", "The Greenhouse team."),
]
# Pixels: width of a character, height of a line, margin.
_CHARACTER, _LINE, _MARGIN = 8.4, 24, 16
_STYLE = (
    "text{font:14px ui-monospace,Menlo,Consolas,monospace;white-space:pre}"
    ".title{font-weight:bold;fill:#57606a}.text{fill:#24292f}.control{fill:#8250df}"
    ".background{fill:#ffffff}.trained{fill:#aceebb}"
)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        "python -m scripts.draw_masks",
        description="Draw a conversation as an SVG file with its trained tokens marked.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output", type=parse_output, default=Path("docs/trained_tokens.svg"), help="default: %(default)s"
    )
    parser.add_argument(
        "--label_mask",
        nargs="+",
        choices=get_args(LabelMask),
        default=["assistant", "qwen"],
        help="one panel each (default: assistant qwen)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    check_output_file(args.output, "--output")
    save_text(draw(args.label_mask), args.output)
    show(f"written: {args.output}")


def draw(label_masks: Sequence[LabelMask]) -> str:
    """SVG with a panel per label mask: one line per message, trained text on a coloured background."""
    elements: list[str] = []
    line, columns = 0, 0
    for label_mask in label_masks:
        elements.append(_text(f"--label_mask {label_mask}", 0, line, "title"))
        line += 1
        for message in render(CONVERSATION, QWEN_V1, label_mask=label_mask):
            column = 0
            for text, kind, is_trained in _runs(message.segments):
                if is_trained:
                    elements.append(_box(len(text), column, line))
                elements.append(_text(text, column, line, kind))
                column += len(text)
            columns, line = max(columns, column), line + 1
        line += 1
    elements.append(_box(len("trained"), 0, line))
    elements.append(_text("trained  not trained  ", 0, line, "text"))
    elements.append(_text("control token", len("trained  not trained  "), line, "control"))
    width, height = 2 * _MARGIN + round(columns * _CHARACTER), 2 * _MARGIN + (line + 1) * _LINE
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    background = '<rect class="background" width="100%" height="100%"/>'
    return "\n".join([head, f"<style>{_STYLE}</style>", background, *elements, "</svg>\n"])


def _runs(segments: Sequence[Segment]) -> Iterator[tuple[str, str, bool]]:
    """Text, CSS class and whether it is trained, of each segment that has text."""
    for segment in segments:
        if segment.text:
            yield segment.text.replace("\n", "↵"), "control" if segment.is_control else "text", segment.weight > 0


def _box(length: int, column: int, line: int) -> str:
    x, y = _MARGIN + column * _CHARACTER, _MARGIN + line * _LINE + 2
    return f'<rect class="trained" x="{x:.1f}" y="{y}" width="{length * _CHARACTER:.1f}" height="{_LINE - 4}"/>'


def _text(text: str, column: int, line: int, kind: str) -> str:
    x, y, width = _MARGIN + column * _CHARACTER, _MARGIN + (line + 1) * _LINE - 7, len(text) * _CHARACTER
    return f'<text class="{kind}" x="{x:.1f}" y="{y}" textLength="{width:.1f}">{escape(text)}</text>'


if __name__ == "__main__":
    run_command(main, "scripts.draw_masks")
