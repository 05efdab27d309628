"""Write conversations in another format: ``python -m scripts.convert_data IN OUT [--to conversations|messages]``.

IN is a file of any format that finetune.py trains on, or a folder of them. OUT ends in .json (a list) or .jsonl (a
record per line), or in either with .gz. What the target cannot express is counted and said.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from checkpoints.files import staged_file
from commands import CommandParser, run_command
from data_utils.files import data_files, read_records
from data_utils.formats import FORMATS, Format, recognise
from data_utils.formats.losses import losses_of, other_fields
from data_utils.schema import Conversation
from errors import ConfigError, DataError, numbered

logger = logging.getLogger(__name__)

ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")

_SHOWN_FAULTS = 20
_LOGGED_PLACES = 5

_HELP = """The default, messages, holds everything that finetune.py reads. In conversations, text beside calls of
functions becomes a turn of its own. In both, a system message becomes the first turn, tools and the other fields of a
record are kept, and what could not be kept is counted and said at the end."""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m scripts.convert_data",
        description="Write conversations in another format.",
        epilog=_HELP,
        allow_abbrev=False,
    )
    targets = [format_.name for format_ in FORMATS.values() if format_.write is not None]
    parser.add_argument("source", metavar="IN", help="a data file, or a folder of them")
    parser.add_argument("output", metavar="OUT", help=f"the file to write: {', '.join(ENDINGS)}")
    parser.add_argument(
        "--data_format",
        choices=["auto", *FORMATS],
        default="auto",
        help="of IN (default auto: its first record says it)",
    )
    parser.add_argument("--to", choices=targets, default="messages", help="format of OUT (default messages)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    source, output = Path(args.source), Path(args.output)
    files = data_files(source)
    check_output(output, source, files, args.overwrite)
    count, losses = convert(files, output, args.data_format, FORMATS[args.to])
    for line in losses.lines():
        logger.warning(line)
    print(f"{count} {'conversation' if count == 1 else 'conversations'} as {args.to}: {output}")


def check_output(output: Path, source: Path, files: Sequence[Path], overwrite: bool) -> None:
    """Check that the output can be written without losing anything.

    Raises:
        ConfigError: another ending, no folder to write to, a file that is there, or part of what is read.
    """
    if not output.name.lower().endswith(ENDINGS):
        raise ConfigError(f"OUT {output} has another ending than {', '.join(ENDINGS)}", "Give it one of these")
    if not output.parent.is_dir():
        raise ConfigError(f"OUT {output}: there is no folder {output.parent}", "Make it first")
    if output.is_dir():
        raise ConfigError(f"OUT {output} is a folder", "Name a file in it")
    resolved = output.resolve()
    if any(resolved == path.resolve() or (output.exists() and output.samefile(path)) for path in files):
        raise ConfigError(f"OUT {output} is part of what is read", "Give another name")
    if source.is_dir() and resolved.is_relative_to(source.resolve()):
        raise ConfigError(f"OUT {output} lies in the folder that is read", "Give a name outside of it")
    if output.exists() and not overwrite:
        raise ConfigError(f"OUT {output} exists", "Give another name, or --overwrite to replace it")


# ----------------------------------------------------------------------------------------------------------- records


class Losses:
    """What could not be expressed: each kind with its count and its first places."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._places: dict[str, list[str]] = {}

    def add(self, kind: str, where: object) -> None:
        self._counts[kind] += 1
        places = self._places.setdefault(kind, [])
        if len(places) < _LOGGED_PLACES:
            places.append(str(where))

    def lines(self) -> list[str]:
        """A line for each kind."""
        lines = []
        for kind, count in self._counts.items():
            places = self._places[kind]
            more = ", ..." if count > len(places) else ""
            lines.append(f"{kind}: {count} {'record' if count == 1 else 'records'}, {', '.join(places)}{more}")
        return lines


class Item(NamedTuple):
    """A record that was read, and what it says."""

    record: dict[str, Any]
    conversation: Conversation
    source: Format


def convert(files: Sequence[Path], output: Path, data_format: str, target: Format) -> tuple[int, Losses]:
    """Read all files and write one, in one step: it has its name when it is whole.

    Args:
        data_format: of the files; ``auto`` asks the first record of each.

    Returns:
        How many records were written, and what was lost.

    Raises:
        DataError: records that cannot be used, up to 20 of them; nothing is written then.
        ConfigError: the output cannot be opened.
    """
    assert target.write is not None, f"{target.name} is never written"
    losses = Losses()
    faults: list[DataError] = []
    total = sum(path.stat().st_size for path in files)
    with (
        tqdm(total=total, desc="Converting", unit="B", unit_scale=True, disable=None) as bar,
        record_writer(output) as write,
    ):
        count = 0
        for item in read_items(files, data_format, bar.update, faults):
            if faults:
                continue
            where = item.conversation.where
            fields = other_fields(item.record, item.source, target)
            write(json_bytes(target.write(item.conversation, fields)))
            for kind in losses_of(item.record, item.conversation, item.source, target):
                losses.add(kind, where)
            count += 1
        if faults:
            raise _as_one(faults, files)
    return count, losses


def read_items(
    files: Sequence[Path], data_format: str, advance: Callable[[int], object], faults: list[DataError]
) -> Iterator[Item]:
    """The records of the files, checked. Faults are added to ``faults``; after 20 of them nothing more is read."""
    for path in files:
        if len(faults) >= _SHOWN_FAULTS:
            return
        source = FORMATS.get(data_format)
        try:
            for where, record in read_records(path, advance):
                if isinstance(record, DataError):
                    faults.append(record)
                else:
                    # Where the first record has no format there is none to hold the others against.
                    source = source or recognise(record, where)
                    try:
                        conversation = source.parse(record, where)
                    except DataError as error:
                        faults.append(error)
                    else:
                        assert isinstance(record, dict), "it was parsed"
                        yield Item(record, conversation, source)
                if len(faults) >= _SHOWN_FAULTS:
                    return
        except DataError as error:  # nothing behind it can be read
            faults.append(error)


def _as_one(faults: Sequence[DataError], files: Sequence[Path]) -> DataError:
    if len(faults) == 1:
        return faults[0]
    where = str(files[0]) if len(files) == 1 else f"{len(files)} files"
    count = f"the first {len(faults)}" if len(faults) >= _SHOWN_FAULTS else str(len(faults))
    return DataError(where, numbered(f"{count} faults, nothing is written", faults))


# ----------------------------------------------------------------------------------------------------------- writing


def json_bytes(record: Mapping[str, Any]) -> bytes:
    """A record as one line of UTF-8. One with lone surrogates, which UTF-8 cannot hold, is written in ASCII."""
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(record).encode()


@contextlib.contextmanager
def record_writer(output: Path) -> Iterator[Callable[[bytes], None]]:
    """A function that adds a record to the file. The file has its name when the block ends well, and never before.

    Raises:
        ConfigError: it cannot be opened.
    """
    name = output.name.lower()
    is_list = name.removesuffix(".gz").endswith(".json")
    with staged_file(output) as partial, _opened(partial, packs=name.endswith(".gz")) as file:
        separator = b"[\n" if is_list else b""

        def write(record: bytes) -> None:
            nonlocal separator
            file.write(separator + record)
            separator = b",\n" if is_list else b"\n"

        yield write
        file.write(b"\n]\n" if is_list else b"\n")


@contextlib.contextmanager
def _opened(path: Path, packs: bool) -> Iterator[BinaryIO | gzip.GzipFile]:
    try:
        file = path.open("wb")
    except OSError as error:
        raise ConfigError(
            f"OUT {path}: cannot be written ({error.strerror or error})", "Choose another folder"
        ) from None
    with file:
        if not packs:
            yield file
            return
        # Without name and time, so that the same records give the same bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
            yield packed


if __name__ == "__main__":
    run_command(main, "scripts.convert_data")
