"""Mutations of gzip files."""

from __future__ import annotations

import gzip
from io import BytesIO

from tests.fuzz_data.valid_files import PACKED, Case, Expect, Mutations, ValidFile

GZIP_MUTATIONS = Mutations(PACKED)


def _compressed(file: ValidFile) -> bytearray:
    return bytearray(gzip.compress(file.text(), mtime=0))


@GZIP_MUTATIONS.register
def _gzip_bytes(file: ValidFile) -> Case:
    data = _compressed(file)
    for _ in range(file.random.randint(1, 3)):
        data[file.random.randrange(len(data))] = file.random.randrange(256)
    return file.with_bytes(bytes(data), Expect.ORACLE_OR_REFUSED)


@GZIP_MUTATIONS.register
def _gzip_ends(file: ValidFile) -> Case:
    """A truncated file, a wrong checksum or length, or bytes after the end."""
    data = _compressed(file)
    change = file.random.choice(["cut", "checksum", "tail"])
    if change == "cut":
        del data[file.random.randrange(1, len(data)) :]
    elif change == "checksum":
        data[-file.random.randint(1, 8)] ^= 1 << file.random.randrange(8)
    else:
        data += file.random.choice([b"x", b"\n", b"\x1f\x8b", b"\0\0x", b"PAR1", gzip.compress(b"more", mtime=0)[:-1]])
    return file.with_bytes(bytes(data), Expect.REFUSED)


@GZIP_MUTATIONS.register
def _gzip_forms(file: ValidFile) -> Case:
    """Several members, empty members, a name in the header, zeros after the end, other names of the file."""
    text, named = file.text(), BytesIO()
    index = file.random.randrange(len(text))
    with gzip.GzipFile("some name.json", "wb", fileobj=named, mtime=0) as member:
        member.write(text)
    whole, *members = (gzip.compress(part, mtime=0) for part in (text, b"", text[:index], b"", text[index:]))
    data = file.random.choice([b"".join(members), named.getvalue(), whole, whole + bytes(999)])
    return file.with_bytes(data, Expect.SAME, suffix=file.random.choice([file.suffix, file.suffix[:-3]]))


@GZIP_MUTATIONS.register
def _gzip_names(file: ValidFile) -> Case:
    """A file that is not compressed, not a table, or compressed twice."""
    if file.random.random() < 0.5:
        return file.with_bytes(file.text(), Expect.REFUSED, suffix=file.random.choice([file.suffix, ".parquet"]))
    return file.with_text(bytes(_compressed(file)), Expect.FAULT)


_FLOODS = (b'{"conversations": "a', b'[{"conversations": "a', b'[{"a": 1}, "a', b" ", b"[ ", b'[{"a": 1}, ')


@GZIP_MUTATIONS.register
def _bomb(file: ValidFile) -> Case:
    start = file.random.choice(_FLOODS)
    return file.with_text(start + start[-1:] * (1 << 20), Expect.REFUSED, limit=1 << 16)


@GZIP_MUTATIONS.register
def _whole_bomb(file: ValidFile) -> Case:
    return file.with_text(file.random.choice(_FLOODS[:2]) + b"a" * 100_000_000, Expect.REFUSED)
