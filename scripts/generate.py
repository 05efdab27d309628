"""Answer a file: ``python -m scripts.generate --model_name_or_path DIR --data_path q.jsonl --output a.jsonl``.

The input is a data file of any format that finetune.py reads, or a folder of them; or a .txt file with a prompt per
line. If a conversation ends with an answer, that answer is what the model writes anew. Plain texts are continued.

Each line of the output is an answer, in the order of the input; with its prompt it is a record that finetune.py reads.
The same command continues a run that was killed, after its last complete line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from commands import CommandParser, quiet_libraries, run_command
from console import show
from errors import ConfigError, DataError, RunError, numbered, one_line
from outputs import check_output_file, parse_output

if TYPE_CHECKING:
    from data_utils.schema import Conversation
    from serving.engine import Engine
    from serving.requests import Answer, Sampling
    from serving.ticket import Ticket

logger = logging.getLogger(__name__)

_SHOWN_FAULTS = 20
# Prompts that are submitted together, sorted by length, for each place of the engine.
_WINDOW = 4


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m scripts.generate", description=(__doc__ or "").partition("\n\n")[2], allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", required=True, help="checkpoint folder, or model id on a hub")
    parser.add_argument("--data_path", required=True, type=Path, help="file or folder of conversations or prompts")
    parser.add_argument("--output", required=True, type=parse_output, help="file of answers, a JSON object per line")
    parser.add_argument("--data_format", default="auto", help="format of the records (default: auto, by the first one)")
    parser.add_argument("--adapter", help="LoRA adapter to use with the model")
    parser.add_argument("--any_base", action="store_true", help="use the adapter with other weights than its own")
    parser.add_argument("--system_message", help="system message of conversations without one")
    parser.add_argument("--n", type=int, default=1, help="answers to each prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default: 0)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="length limit of an answer (default: 512)")
    for name, kind, meaning in _SAMPLING:
        parser.add_argument(f"--{name}", type=kind, help=f"{meaning} (default: that of the checkpoint)")
    parser.add_argument("--stop", action="append", default=[], help="text that ends an answer; can be given repeatedly")
    parser.add_argument("--no_thinking", action="store_true", help="let a model that can think answer without it")
    parser.add_argument(
        "--max_concurrency", type=int, default=16, help="answers written at the same time (default: 16)"
    )
    parser.add_argument("--device_map", help="auto spreads the model over all GPUs (default: one GPU, or the CPU)")
    parser.add_argument("--kv_cache", choices=("int8", "fp8"), help="keep keys and values in 8 bits")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    args = parser.parse_args(argv)
    if args.any_base and args.adapter is None:
        parser.error("--any_base needs --adapter")
    for name in ("n", "max_new_tokens", "max_concurrency"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is too small; give 1 or more")
    return args


_SAMPLING = (
    ("temperature", float, "temperature; 0 takes the most likely token each time"),
    ("top_p", float, "probability that the tokens have together which are drawn from"),
    ("top_k", int, "number of the most likely tokens that are drawn from; 0 is all"),
    ("repetition_penalty", float, "divides the scores of tokens of prompt and answer"),
    ("presence_penalty", float, "subtracted from the scores of tokens of the answer"),
    ("frequency_penalty", float, "subtracted as many times as a token is in the answer"),
)
# Flags that decide what the answers are.
_DECIDING = (
    "model_name_or_path", "adapter", "system_message", "n", "seed", "max_new_tokens", "stop", "no_thinking", "kv_cache",
    "data_format", *(name for name, _, _ in _SAMPLING),
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    quiet_libraries()
    check_output_file(args.output, "--output", {"--data_path": [args.data_path]})
    sampling = _sampling_of(args)
    from serving.engine import Engine

    source = Prompts(args.data_path, args.data_format)
    total = source.check()
    with AnswerFile(args.output, _run_of(args, source)) as file:
        done = file.count
        if done == total * args.n:
            show(f"{args.output} is complete: {done} answers")
            return
        adapters = {} if args.adapter is None else {"adapter": args.adapter}
        engine = Engine.load(
            args.model_name_or_path, adapters, device_map=args.device_map, kv_cache=args.kv_cache,
            max_concurrency=args.max_concurrency, queue_size=1 << 30, any_base=args.any_base,
        )  # fmt: skip
        with engine:
            failed = answer_all(engine, source, file, args, sampling, total * args.n)
    show(f"{total * args.n} answers: {args.output}")
    if failed:
        raise RunError(f"{failed} of them failed, and have an error instead of an answer", "See the warnings above")


def _sampling_of(args: argparse.Namespace) -> Sampling:
    from serving.requests import RequestError, Sampling

    values = {name: getattr(args, name) for name, _, _ in _SAMPLING}
    try:
        return Sampling(**values, max_tokens=args.max_new_tokens, stop=tuple(args.stop))
    except RequestError as error:
        raise ConfigError(f"--{error}") from None


def _run_of(args: argparse.Namespace, source: Prompts) -> dict[str, Any]:
    """Return what decides the answers of a run: flags, and the content of local weights and of the data.

    Raises:
        ConfigError: a folder contains no weights.
    """
    from checkpoints.names import ADAPTER_WEIGHTS, WEIGHTS
    from checkpoints.shards import fingerprint

    run = {name: getattr(args, name) for name in _DECIDING}
    for flag, names in (("model_name_or_path", WEIGHTS), ("adapter", ADAPTER_WEIGHTS)):
        if run[flag] is not None and Path(run[flag]).is_dir():
            run[f"{flag}_sha256"] = fingerprint(run[flag], names)
    return {**run, "data_sha256": source.digest()}


# ------------------------------------------------------------------------------------------------------------ prompts


class Prompts:
    """The prompts of a file or a folder."""

    def __init__(self, path: Path, data_format: str) -> None:
        from data_utils.files import data_files
        from data_utils.formats import FORMATS

        if data_format not in ("auto", *FORMATS):
            raise ConfigError(f"--data_format {data_format} is unknown", f"Give one of {', '.join(['auto', *FORMATS])}")
        self._format = data_format
        self._files = data_files(path)

    def digest(self) -> str:
        """Return a checksum of the files."""
        whole = hashlib.sha256()
        for path in self._files:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    whole.update(block)
        return whole.hexdigest()

    def check(self) -> int:
        """Return the number of prompts.

        Raises:
            DataError: invalid records, up to 20 of them; or none at all.
        """
        faults: list[DataError] = []
        count = 0
        for item in self._parsed():
            count += 1
            if isinstance(item, DataError):
                faults.append(item)
                if len(faults) == _SHOWN_FAULTS:
                    break
        if len(faults) == 1:
            raise faults[0]
        if faults:
            raise DataError(str(self._files[0]), numbered(f"{len(faults)} faults, nothing is answered", faults))
        if not count:
            raise DataError(", ".join(map(str, self._files)), "contains no prompt")
        return count

    def __iter__(self) -> Iterator[Conversation]:
        for item in self._parsed():
            if isinstance(item, DataError):
                raise item  # the file has changed since it was checked
            yield item

    def _parsed(self) -> Iterator[Conversation | DataError]:
        for path in self._files:
            is_text = path.name.lower().endswith(".txt")
            try:
                yield from _lines_of(path) if is_text else self._records_of(path)
            except DataError as error:
                yield error

    def _records_of(self, path: Path) -> Iterator[Conversation | DataError]:
        from data_utils.files import read_records
        from data_utils.formats import FORMATS, recognise

        source = FORMATS.get(self._format)
        for where, record in read_records(path):
            if isinstance(record, DataError):
                yield record
                continue
            source = source or recognise(record, where)
            try:
                yield _prompt_of(source.parse(record, where))
            except DataError as error:
                yield error


def _lines_of(path: Path) -> Iterator[Conversation | DataError]:
    """Yield a prompt for each line of a text file that is not blank."""
    from chat.turns import Turn
    from data_utils.schema import Conversation

    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                yield DataError(f"{path}:{number}", "the line is not UTF-8", "Convert the file to UTF-8")
                continue
            if text:
                yield Conversation((Turn("user", text),), f"{path}:{number}")


def _prompt_of(conversation: Conversation) -> Conversation:
    """Return a conversation without the answer that it ends with.

    Raises:
        DataError: nothing precedes that answer, or its calls have no results.
    """
    from dataclasses import replace

    turns = conversation.turns
    prompt = turns[:-1] if turns[-1].role == "assistant" else turns
    if not prompt:
        raise DataError(str(conversation.where), "has an answer, and nothing to answer", "Remove the record")
    return replace(conversation, turns=prompt)


# ------------------------------------------------------------------------------------------------------------ answers


class Task(NamedTuple):
    """One answer that is to be written: the record's number, and the number among the answers to it."""

    number: int
    choice: int
    conversation: Conversation
    prompt_ids: tuple[int, ...]


def answer_all(
    engine: Engine, source: Prompts, file: AnswerFile, args: argparse.Namespace, sampling: Sampling, total: int
) -> int:
    """Write all answers that the file lacks, in their order, and return how many failed."""
    from tqdm import tqdm

    tasks = islice(_tasks(engine, source, args), file.count, None)
    window = _WINDOW * args.max_concurrency
    running: deque[tuple[Task, Ticket | Exception]] = deque()
    failed = 0
    with tqdm(total=total, initial=file.count, desc="Answering", unit="answer", disable=None) as bar:
        while True:
            if len(running) <= window // 2:
                running += _submit(engine, list(islice(tasks, window)), args, sampling)
            if not running:
                return failed
            task, ticket = running.popleft()
            line = _line(engine, task, ticket, args.no_thinking)
            failed += "error" in line
            file.add(line)
            bar.update()
            done, seconds = engine.load_now().completion_tokens, bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{done / max(seconds, 1e-3):.0f} tokens/s", refresh=False)


def _tasks(engine: Engine, source: Prompts, args: argparse.Namespace) -> Iterator[Task]:
    for index, conversation in enumerate(source):
        turns = conversation.turns
        thinking = False if args.no_thinking else None
        try:
            if conversation.is_text:
                ids = engine.encode(turns[0].content)
            else:
                ids = engine.render_turns(turns, conversation.tools, args.system_message, thinking)
        except ConfigError as error:
            raise DataError(str(conversation.where), one_line(error)) from None
        for choice in range(args.n):
            yield Task(index, choice, conversation, ids)


def _submit(
    engine: Engine, tasks: Sequence[Task], args: argparse.Namespace, sampling: Sampling
) -> list[tuple[Task, Ticket | Exception]]:
    """Submit tasks, those of similar length after each other, and return them in their own order."""
    from dataclasses import replace

    from serving.requests import Request, RequestError

    tickets: dict[int, Ticket | Exception] = {}
    adapter = None if args.adapter is None else "adapter"
    for number in sorted(range(len(tasks)), key=lambda number: -len(tasks[number].prompt_ids)):
        task = tasks[number]
        seed = hashlib.sha256(f"{args.seed} {task.number} {task.choice}".encode()).digest()
        form = engine.family.tool_form if task.conversation.tools else None
        stops = (*sampling.stop, *(form.stops if form else ()))
        settings = replace(sampling, seed=int.from_bytes(seed[:7], "big"), stop=stops)
        try:
            tickets[number] = engine.submit(Request(task.prompt_ids, settings, adapter))
        except RequestError as error:  # a prompt that is too long
            tickets[number] = error
    return [(task, tickets[number]) for number, task in enumerate(tasks)]


def _line(engine: Engine, task: Task, ticket: Ticket | Exception, no_thinking: bool) -> dict[str, Any]:
    """Wait for an answer, and return its line."""
    place = {"index": task.number, "choice": task.choice}
    try:
        if isinstance(ticket, Exception):
            raise ticket
        answer = ticket.answer()
    except Exception as error:
        logger.warning("%s: no answer: %s", task.conversation.where, one_line(error))
        return {**place, "error": one_line(error)}
    usage = {"prompt_tokens": answer.usage.prompt_tokens, "completion_tokens": answer.usage.completion_tokens}
    record = _record(engine, task.conversation, answer, no_thinking)
    return {**place, **record, "answer": answer.text, "finish_reason": answer.finish_reason, "usage": usage}


def _record(engine: Engine, conversation: Conversation, answer: Answer, no_thinking: bool) -> dict[str, Any]:
    """Return a conversation with its answer as a record of the format messages, or a continued text."""
    from dataclasses import replace

    from chat.reading import opening_of, read_answer
    from data_utils.formats.writing import write_messages

    turns = conversation.turns
    if conversation.is_text:
        return {"text": turns[0].content + answer.text}
    has_tools = bool(conversation.tools)
    thinking = False if no_thinking else None
    opening = opening_of(engine.family, has_tools, turns[-1].role == "tool", thinking)
    turn = read_answer(answer.text, engine.family, has_tools, opening)
    return write_messages(replace(conversation, turns=(*turns, turn)), {})


class AnswerFile:
    """The output: lines that are added one by one, and a file beside it that says which run they belong to.

    Args:
        run: what decides the answers.

    Attributes:
        count: complete lines.

    Raises:
        ConfigError: the file is another run's, or another process is writing it.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self._path, self._run, self.count = path, run, 0
        self._run_path = path.with_name(f"{path.name}.run.json")

    def __enter__(self) -> AnswerFile:
        import fcntl

        self._check_run()
        self._file = self._path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(f"--output {self._path}: another process is writing it", "Wait for its end") from None
        self._run_path.write_text(json.dumps(self._run, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        self.count = self._repair()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, line: dict[str, Any]) -> None:
        """Write a line; it is on its way to the disk when this returns."""
        try:
            encoded = json.dumps(line, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # lone surrogates
            encoded = json.dumps(line).encode()
        self._file.write(encoded + b"\n")
        self._file.flush()
        self.count += 1

    def _check_run(self) -> None:
        if not self._path.exists() or not self._path.stat().st_size:
            return
        fix = "Give another name, or remove it"
        try:
            saved = json.loads(self._run_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError(f"--output {self._path} exists, and was not written by this command", fix) from None
        for name, value in self._run.items():
            before = saved.get(name) if isinstance(saved, dict) else None
            if before != value and name == "data_sha256":
                raise ConfigError(f"--output {self._path} has the answers to other data", fix)
            if before != value and name.endswith("_sha256"):
                flag = f"--{name.removesuffix('_sha256')}"
                raise ConfigError(f"--output {self._path} has answers of other weights than {flag} has now", fix)
            if before != value:
                raise ConfigError(f"--output {self._path} is of a run with --{name} {before}, not {value}", fix)

    def _repair(self) -> int:
        """Remove a last line that is not complete, and return the number of the others."""
        self._file.seek(0)
        count = size = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                logger.warning("--output %s: its last line is incomplete, and is written again", self._path)
                self._file.truncate(size)
                break
            count, size = count + 1, size + len(line)
        self._file.seek(0, 2)
        return count


if __name__ == "__main__":
    run_command(main, "scripts.generate")
