"""Run many mutations and print a table of their results."""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from tests.fuzz_data.chat_formats import FAMILIES, NAMES, QWEN, ChatFormat, chat_formats
from tests.fuzz_data.examine import Result, examine, first_peak
from tests.fuzz_data.gzip_mutations import GZIP_MUTATIONS
from tests.fuzz_data.parquet_mutations import PARQUET_MUTATIONS
from tests.fuzz_data.text_mutations import TEXT_MUTATIONS
from tests.fuzz_data.valid_files import FORMATS, Case, ValidFile

MUTATIONS = TEXT_MUTATIONS | GZIP_MUTATIONS | PARQUET_MUTATIONS
SLOW = ("five_megabytes", "whole_bomb")  # run in every tenth round only
HANG_TIMEOUT = 120.0
CASES_OF_A_CHECKPOINT = 40  # before the next one: to detect a chat format takes longer than a case


def make_case(seed: int, number: int) -> Case:
    """Build case ``number`` of a seed. The mutations take turns."""
    random = Random(f"{seed} {number}")
    turn, index = divmod(number, len(MUTATIONS))
    name = list(MUTATIONS)[index]
    if name in SLOW and turn % 10:
        name = random.choice([name for name in MUTATIONS if name not in SLOW])
    suffixes, mutate = MUTATIONS[name]
    case = mutate(ValidFile(random, name, random.choice(list(FORMATS)), random.choice(suffixes)))
    is_long = name in (*SLOW, "nesting", "numbers", "bomb")
    chunk = random.choice([None, 5000] if is_long else [None, 1, 7, 64])
    return replace(case, chunk=chunk, chat=_chat_format(Random(f"{seed} {number} chat"), number))


def _chat_format(random: Random, number: int) -> ChatFormat:
    """Return Qwen v1's format for one case of three, else one of the checkpoint whose turn it is."""
    if random.random() < 0.33 or not FAMILIES.is_dir():
        return QWEN
    return random.choice(chat_formats(NAMES[number // CASES_OF_A_CHECKPOINT % len(NAMES)]))


def run(seed: int, numbers: Iterable[int], folder: Path, keep: Path | None = None) -> Iterator[Result]:
    """Examine cases in this process, and keep the files of findings in ``keep``."""
    for number in numbers:
        case = make_case(seed, number)
        result = examine(case, folder / case.name, number)
        if keep is not None and result.findings:
            (keep / f"{seed}-{number}-{case.name}").write_bytes(case.data)
        yield result


def _work(results: Connection, seed: int, numbers: Sequence[int], keep: Path | None) -> None:
    first_peak()
    with tempfile.TemporaryDirectory() as folder, closing(results):
        for result in run(seed, numbers, Path(folder), keep):
            results.send(result)


def run_apart(seed: int, numbers: Sequence[int], keep: Path | None = None) -> Iterator[Result]:
    """Examine cases in another process, so that a crash or hang becomes a finding."""
    waiting = list(numbers)
    while waiting:
        results, end = Pipe(duplex=False)
        process = Process(target=_work, args=(end, seed, waiting, keep))
        process.start()
        end.close()
        finding = f"hangs for more than {HANG_TIMEOUT:.0f} s"
        try:
            while waiting and results.poll(HANG_TIMEOUT):
                yield results.recv()
                waiting = waiting[1:]
        except EOFError:
            process.join()
            finding = f"ends the process with {process.exitcode}"
        process.kill()
        process.join()
        if waiting:
            case = make_case(seed, waiting[0])
            yield Result(waiting[0], case.mutation, case.chat, findings=[finding])
            waiting = waiting[1:]


OUTCOMES = ("same", "other", "skipped", "refused")


def summary(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of a table: the outcomes of each mutation, with bad records refused and skipped."""
    by_mutation: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_mutation[result.mutation].append(result)
    heads = "".join(f"{outcome:>9}" for outcome in OUTCOMES)
    yield f"{'':26}{'bad records refused':^36} |{'bad records skipped':^36} |"
    yield f"{'mutation':20}{'files':>6}{heads} |{heads} |{'findings':>9}{'slowest':>9}"
    for name, group in [*by_mutation.items(), ("all", list(results))]:
        row = f"{name:20}{len(group):6}"
        for mode in (0, 1):
            counts = Counter(result.outcomes[mode] for result in group if result.outcomes)
            row += "".join(f"{counts[outcome] or '':>9}" for outcome in OUTCOMES) + " |"
        findings = sum(bool(result.findings) for result in group)
        yield f"{row}{findings or '':>9}{max((result.seconds for result in group), default=0):>7.2f} s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz_data", description="Mutate data files, read them and compare with an oracle."
    )
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="number of mutations (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random choices (default: 0)")
    parser.add_argument("--only", type=int, metavar="K", help="run one mutation, by its number")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="save the files of findings to this folder")
    args = parser.parse_args(argv)
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
    results = []
    for result in run_apart(args.seed, range(args.count) if args.only is None else [args.only], args.keep):
        results.append(result)
        for finding in result.findings:
            print(
                f"--seed {args.seed} --only {result.number} ({result.mutation}, {result.chat}): {finding}", flush=True
            )
    print("\n".join(summary(results)))
    return 1 if any(result.findings for result in results) else 0
