"""What the records beside an adapter tell of its training: figures and names, never content, nor where files lay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from checkpoints.shards import load_json
from errors import ConfigError

_MAX_SOURCES = 20


def training_lines(adapter: Path, code: Callable[[object], str]) -> list[str]:
    """A line per fact of ``run_summary.json`` and ``data_receipt.json``; none where these are missing or unreadable.

    Args:
        adapter: the adapter's folder.
        code: writes a text that is not ours.
    """
    summary, receipt = _read(adapter / "run_summary.json"), _read(adapter / "data_receipt.json")
    lines = list(_figures(summary))
    for split, told in _objects(receipt or _object(summary.get("data"))):
        counts = f"{_number(told.get('kept'))} conversations, {_number(told.get('tokens'))} tokens"
        lines.append(f"{code(split)} data: {counts}, {_number(told.get('trained_tokens'))} of them learnt")
        sources = told.get("sources")
        named = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else [told]
        lines += [f"{code(split)} data: {_source(source, code)}" for source in named[:_MAX_SOURCES]]
        if len(named) > _MAX_SOURCES:
            lines.append(f"{code(split)} data: {len(named) - _MAX_SOURCES} more sources")
    return lines


def base_name(path: object) -> str:
    """The last part of a path of any system."""
    return PurePosixPath(PureWindowsPath(str(path)).as_posix()).name


def _figures(summary: Mapping[str, Any]) -> Iterator[str]:
    if "steps" in summary:
        yield f"{_number(summary['steps'])} optimizer steps over {_number(summary.get('trained_tokens'))} learnt tokens"
    if isinstance(summary.get("first_loss"), (int, float)):
        yield f"training loss {_number(summary['first_loss'])} -> {_number(summary.get('last_loss'))}"
    if isinstance(summary.get("last_eval_loss"), (int, float)):
        yield f"evaluation loss {_number(summary['last_eval_loss'])}"


def _source(source: Mapping[str, Any], code: Callable[[object], str]) -> str:
    return f"{code(base_name(source.get('path') or '?'))}, {_number(source.get('kept'))} conversations"


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "?"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _objects(value: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, told) for name, told in value.items() if isinstance(told, dict)]


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    """A record that is damaged keeps no model from being exported."""
    try:
        return load_json(path) if path.is_file() else {}
    except ConfigError:
        return {}
