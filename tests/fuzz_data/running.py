"""Many mutations, one after the other, and a table of what came of them."""

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

from tests.fuzz_data.damages import KINDS, RARE
from tests.fuzz_data.drafts import FORMATS, Case, Draft
from tests.fuzz_data.examining import Result, examine, first_peak

HANGS_AFTER = 120.0


def make_case(seed: int, number: int) -> Case:
    """Mutation ``number``: the kinds come one after the other."""
    random = Random(f"{seed} {number}")
    turn, place = divmod(number, len(KINDS))
    name = list(KINDS)[place]
    if name in RARE and turn % 10:
        name = random.choice([name for name in KINDS if name not in RARE])
    suffixes, damage = KINDS[name]
    case = damage(Draft(random, name, random.choice(list(FORMATS)), random.choice(suffixes)))
    is_long = name in (*RARE, "nesting", "numbers", "bomb")
    return replace(case, chunk=random.choice([None, 5000] if is_long else [None, 1, 7, 64]))


def run(seed: int, numbers: Iterable[int], folder: Path, keep: Path | None = None) -> Iterator[Result]:
    """Examine mutations in this process; the files of those with findings are kept in ``keep``."""
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
    """The same in a process of its own: one that dies or hangs is a finding."""
    waiting = list(numbers)
    while waiting:
        results, end = Pipe(duplex=False)
        process = Process(target=_work, args=(end, seed, waiting, keep))
        process.start()
        end.close()
        what = f"hangs for more than {HANGS_AFTER:.0f} s"
        try:
            while waiting and results.poll(HANGS_AFTER):
                yield results.recv()
                waiting = waiting[1:]
        except EOFError:
            process.join()
            what = f"ends the process with {process.exitcode}"
        process.kill()
        process.join()
        if waiting:
            yield Result(waiting[0], make_case(seed, waiting[0]).kind, findings=[what])
            waiting = waiting[1:]


OUTCOMES = ("same", "other", "skipped", "refused")


def summary(results: Sequence[Result]) -> Iterator[str]:
    """A table: how often each kind came to what, first when bad records are refused, then when they are skipped."""
    by_kind: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_kind[result.kind].append(result)
    heads = "".join(f"{outcome:>9}" for outcome in OUTCOMES)
    yield f"{'':26}{'bad records refused':^36} |{'bad records skipped':^36} |"
    yield f"{'kind':20}{'files':>6}{heads} |{heads} |{'findings':>9}{'slowest':>9}"
    for name, each in [*by_kind.items(), ("all", list(results))]:
        row = f"{name:20}{len(each):6}"
        for mode in (0, 1):
            counts = Counter(result.outcomes[mode] for result in each if result.outcomes)
            row += "".join(f"{counts[outcome] or '':>9}" for outcome in OUTCOMES) + " |"
        findings = sum(bool(result.findings) for result in each)
        yield f"{row}{findings or '':>9}{max((result.seconds for result in each), default=0):>7.2f} s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_data", description="Damage data files and read them.")
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="mutations; default 2000")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is damaged, and how; default 0")
    parser.add_argument("--only", type=int, metavar="K", help="one mutation, by its number")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the files of findings there")
    args = parser.parse_args(argv)
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
    results = []
    for result in run_apart(args.seed, range(args.count) if args.only is None else [args.only], args.keep):
        results.append(result)
        for finding in result.findings:
            print(f"--seed {args.seed} --only {result.number} ({result.kind}): {finding}", flush=True)
    print("\n".join(summary(results)))
    return 1 if any(result.findings for result in results) else 0
