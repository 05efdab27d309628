"""List the prepared data that runs keep for later runs, and remove what is not needed any more.

    python -m scripts.data_cache
    python -m scripts.data_cache --remove_unused 30

An entry is removed only if no run uses it. Other files in the folder are left as they are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from commands import CommandParser, run_command
from console import show
from errors import ConfigError
from training.cache_entries import Entry, default_folder, find_entries

_DAY = 24 * 3600


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m scripts.data_cache", description=__doc__, allow_abbrev=False)
    parser.add_argument("--data_cache_dir", metavar="DIR", help="as of finetune.py (default: your cache folder)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--remove", nargs="+", metavar="NAME", help="entries to remove; the start of a name is enough")
    group.add_argument("--remove_unused", type=float, metavar="DAYS", help="remove what was not used for DAYS days")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    cache = default_folder() if args.data_cache_dir is None else Path(args.data_cache_dir).expanduser()
    if args.data_cache_dir is not None and not cache.is_dir():
        raise ConfigError(f"--data_cache_dir {cache}: no such folder", "Give the folder that the runs were given")
    entries = find_entries(cache)
    chosen = choose(entries, args.remove or (), args.remove_unused)
    for entry in entries:
        if entry not in chosen:
            show(describe(entry))
    for entry in chosen:
        try:
            entry.remove()
        except ConfigError as error:
            show(f"kept:     {error}")
        else:
            show(f"removed:  {describe(entry)}")
    show(f"{cache}: {len(entries)} entries, {len(chosen)} to remove" if chosen else f"{cache}: {len(entries)} entries")


def choose(entries: Sequence[Entry], names: Sequence[str], days: float | None) -> list[Entry]:
    """Return the entries to remove.

    Raises:
        ConfigError: a negative number of days, or a name that is the start of none or of several entries.
    """
    if days is not None:
        if not days >= 0:
            raise ConfigError(f"--remove_unused {days:g} is out of range", "Give 0 or more days")
        return [entry for entry in entries if entry.used < time.time() - days * _DAY]
    chosen = []
    for name in names:
        found = [entry for entry in entries if entry.path.name.startswith(name)]
        if len(found) != 1:
            raise ConfigError(f"--remove {name} is the start of {len(found)} entries", "Give a longer part of one name")
        chosen += found
    return chosen


def describe(entry: Entry) -> str:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    model = f", {entry.model}" if entry.model else ""
    return f"{entry.path.name}  {entry.size / 2**20:9,.1f} MiB  used {used}{model}: {', '.join(entry.sources)}"


if __name__ == "__main__":
    run_command(main, "data_cache.py")
