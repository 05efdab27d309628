"""Convert conversations to another format: ``python -m scripts.convert_data IN OUT [--to conversations|messages]``.

IN is a data file of any format that finetune.py reads, or a folder of data files. OUT ends in .json (a list) or .jsonl
(a record per line), both also with .gz. What changes in the conversion is counted and logged.
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

from commands import CommandParser, run_command
from console import python_command, show
from data_utils.files import data_files, read_records
from data_utils.formats import FORMATS, Format, recognise
from data_utils.formats.conversion import conversion_changes, other_fields
from data_utils.schema import Conversation
from errors import ConfigError, DataError, numbered
from outputs import check_output_file, parse_output, staged_file

logger = logging.getLogger(__name__)

ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")

_SHOWN_FAULTS = 20
_LOGGED_LOCATIONS = 5

_EPILOG = """messages can store everything that finetune.py reads. In conversations, the text of a turn with function
calls becomes a separate turn. In both formats a system message becomes the first turn, and tools and other fields of a
record are kept. Whatever could not be kept is counted and logged at the end."""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m scripts.convert_data",
        description="Convert conversations to another format.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    targets = [format_.name for format_ in FORMATS.values() if format_.write is not None]
    parser.add_argument("source", metavar="IN", help="data file, or folder of data files")
    parser.add_argument("output", type=parse_output, metavar="OUT", help=f"file to write: {', '.join(ENDINGS)}")
    parser.add_argument(
        "--data_format",
        choices=["auto", *FORMATS],
        default="auto",
        help="format of IN (default: auto, recognised by the first record of each file)",
    )
    parser.add_argument("--to", choices=targets, default="messages", help="format of OUT (default: messages)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    source, output = Path(args.source), args.output
    if not args.source:
        raise ConfigError("IN is empty", "Give a data file, or a folder of data files")
    files = data_files(source)
    check_output(output, source, files, args.overwrite)
    count, changes = convert(files, output, args.data_format, FORMATS[args.to], args.overwrite)
    for line in changes.lines():
        logger.warning(line)
    show(f"{count} {'conversation' if count == 1 else 'conversations'} as {args.to}: {output}")
    show(f"next: {python_command('-m scripts.preview_data --model_name_or_path MODEL --data_path', output)}")


def check_output(output: Path, source: Path, files: Sequence[Path], overwrite: bool) -> None:
    """Check that the output can be written without destroying anything.

    Raises:
        ConfigError: an unknown ending, a missing folder, an existing file, or a part of the input.
    """
    if not output.name.lower().endswith(ENDINGS):
        raise ConfigError(f"OUT {output} has another ending than {', '.join(ENDINGS)}", "Give it one of these")
    check_output_file(output, "OUT", {"IN": [source, *files]})
    if output.exists() and not overwrite:
        raise ConfigError(f"OUT {output} exists", "Give another name, or --overwrite to replace it")


# ----------------------------------------------------------------------------------------------------------- records


class ChangeCounts:
    """Kinds of changes with their counts and first locations."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._locations: dict[str, list[str]] = {}

    def add(self, change: str, where: object) -> None:
        self._counts[change] += 1
        locations = self._locations.setdefault(change, [])
        if len(locations) < _LOGGED_LOCATIONS:
            locations.append(str(where))

    def lines(self) -> list[str]:
        """Return a line for each kind of change."""
        lines = []
        for change, count in self._counts.items():
            locations = self._locations[change]
            more = ", ..." if count > len(locations) else ""
            lines.append(f"{change}: {count} {'record' if count == 1 else 'records'}, {', '.join(locations)}{more}")
        return lines


class ParsedItem(NamedTuple):
    """A record, its conversation, and its format."""

    record: dict[str, Any]
    conversation: Conversation
    source: Format


def convert(
    files: Sequence[Path], output: Path, data_format: str, target: Format, overwrite: bool
) -> tuple[int, ChangeCounts]:
    """Read all files and write one, which gets its name only when it is complete.

    Args:
        data_format: of the files; ``auto`` recognises the format of each file by its first record.
        overwrite: replace a file that is there.

    Returns:
        The number of records written, and what changed.

    Raises:
        DataError: invalid records, up to 20 of them; nothing is written.
        ConfigError: the output cannot be opened.
    """
    assert target.write is not None, f"{target.name} cannot be written"
    changes = ChangeCounts()
    faults: list[DataError] = []
    total = sum(path.stat().st_size for path in files)
    with (
        tqdm(total=total, desc="Converting", unit="B", unit_scale=True, disable=None) as bar,
        record_writer(output, overwrite) as write,
    ):
        count = 0
        for item in parse_files(files, data_format, bar.update, faults):
            if faults:
                continue
            where = item.conversation.where
            fields = other_fields(item.record, item.source, target)
            write(json_bytes(target.write(item.conversation, fields)))
            for change in conversion_changes(item.record, item.conversation, item.source, target):
                changes.add(change, where)
            count += 1
        if faults:
            raise _join_faults(faults, files)
    return count, changes


def parse_files(
    files: Sequence[Path], data_format: str, advance: Callable[[int], object], faults: list[DataError]
) -> Iterator[ParsedItem]:
    """Yield the valid records of the files. Faults are appended to ``faults``; reading stops after 20 of them."""
    for path in files:
        if len(faults) >= _SHOWN_FAULTS:
            return
        source = FORMATS.get(data_format)
        try:
            for where, record in read_records(path, advance):
                if isinstance(record, DataError):
                    faults.append(record)
                else:
                    # Raises if the first record has no known format: then no other record of the file can be checked.
                    source = source or recognise(record, where)
                    if source.name == "text":
                        raise DataError(
                            str(where), "is plain text, which has no turns to convert", "Train on it as it is"
                        )
                    try:
                        conversation = source.parse(record, where)
                    except DataError as error:
                        faults.append(error)
                    else:
                        assert isinstance(record, dict), "checked by parse"
                        yield ParsedItem(record, conversation, source)
                if len(faults) >= _SHOWN_FAULTS:
                    return
        except DataError as error:  # nothing after it can be read
            faults.append(error)


def _join_faults(faults: Sequence[DataError], files: Sequence[Path]) -> DataError:
    if len(faults) == 1:
        return faults[0]
    where = str(files[0]) if len(files) == 1 else f"{len(files)} files"
    count = f"the first {len(faults)}" if len(faults) >= _SHOWN_FAULTS else str(len(faults))
    return DataError(where, numbered(f"{count} faults, nothing is written", faults))


# ----------------------------------------------------------------------------------------------------------- writing


def json_bytes(record: Mapping[str, Any]) -> bytes:
    """Encode a record as one line of UTF-8; in ASCII if it has lone surrogates, which UTF-8 cannot encode."""
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(record).encode()


@contextlib.contextmanager
def record_writer(output: Path, overwrite: bool) -> Iterator[Callable[[bytes], None]]:
    """Yield a function that appends a record to the file, which gets its name only if the block ends without error.

    Raises:
        ConfigError: the file cannot be opened.
    """
    name = output.name.lower()
    is_list = name.removesuffix(".gz").endswith(".json")
    with staged_file(output, replaces=overwrite) as partial, _open(partial, compress=name.endswith(".gz")) as file:
        separator = b"[\n" if is_list else b""

        def write(record: bytes) -> None:
            nonlocal separator
            file.write(separator + record)
            separator = b",\n" if is_list else b"\n"

        yield write
        file.write(b"\n]\n" if is_list else b"\n")


@contextlib.contextmanager
def _open(path: Path, compress: bool) -> Iterator[BinaryIO | gzip.GzipFile]:
    try:
        file = path.open("wb")
    except OSError as error:
        raise ConfigError(
            f"OUT {path}: cannot be written ({error.strerror or error})", "Choose another folder"
        ) from None
    with file:
        if not compress:
            yield file
            return
        # Without name and time in the header, so that the same records give the same bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as compressed:
            yield compressed


if __name__ == "__main__":
    run_command(main, "scripts.convert_data")
