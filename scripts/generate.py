"""Answer a file: ``python -m scripts.generate --model_name_or_path DIR --data_path q.jsonl --output a.jsonl``.

The input is a data file of any format that finetune.py reads, with or without answers, or a folder of them; or a .txt
file with a prompt per line. If a conversation ends with an answer, the model writes that answer anew. Plain texts are
continued.

Each line of the output is an answer, in the order of the input; with its prompt it is a record that finetune.py reads,
and does not train where the limit of tokens has cut the answer off. Prompts that cannot be answered, and answers that
are cut off within their thinking, are listed in a file beside it, NAME.errors, and the exit code is 1. The same command
continues a run that was killed, and tries again what has no answer.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from commands import CommandParser, run_command, set_up_logging
from console import show
from errors import ConfigError, RunError, Terminated, one_line
from outputs import check_output_file, parse_output
from serving.flags import add_model_flags, add_template_flags, check_template_options, template_options

if TYPE_CHECKING:
    from data_utils.answer_file import AnswerFile
    from data_utils.prompts import Prompts
    from data_utils.schema import Conversation, Record
    from serving.engine import Engine
    from serving.requests import Answer, Sampling
    from serving.ticket import Ticket

logger = logging.getLogger(__name__)

# The largest value of a flag; and of answers, in a file and for each prompt.
_LIMITS = {"n": 10_000, "max_new_tokens": 1 << 20, "max_concurrency": 1024}
_MOST_ANSWERS, _MOST_TOKENS_OF_A_PROMPT = 100_000_000, 10_000_000
_SHOWN_ERRORS = 20
# Prompts that are submitted together, sorted by length, for each place of the engine.
_WINDOW = 4


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m scripts.generate", description=(__doc__ or "").partition("\n\n")[2], allow_abbrev=False
    )
    add_model_flags(parser, "LoRA adapter to use with the model", several_adapters=False)
    parser.add_argument("--data_path", required=True, type=Path, help="file or folder of conversations or prompts")
    parser.add_argument("--output", required=True, type=parse_output, help="file of answers, a JSON object per line")
    parser.add_argument("--data_format", default="auto", help="format of the records (default: auto, by the first one)")
    parser.add_argument("--system_message", help="system message of conversations without one")
    parser.add_argument("--n", type=int, default=1, help="answers to each prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default: 0)")
    parser.add_argument(
        "--max_new_tokens", "--max_tokens", type=int, default=512, help="length limit of an answer (default: 512)"
    )
    for name, kind, meaning in _SAMPLING:
        parser.add_argument(f"--{name}", type=kind, help=f"{meaning} (default: that of the checkpoint)")
    parser.add_argument("--stop", action="append", default=[], help="text that ends an answer; can be given repeatedly")
    add_template_flags(parser)
    parser.add_argument(
        "--max_concurrency", type=int, default=16, help="answers written at the same time (default: 16)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    args = parser.parse_args(argv)
    if args.any_base and args.adapter is None:
        parser.error("--any_base needs --adapter")
    for name, most in _LIMITS.items():
        if not 1 <= getattr(args, name) <= most:
            parser.error(f"--{name} {getattr(args, name)} is out of range; give 1 to {most}")
    if (tokens := args.n * args.max_new_tokens) > _MOST_TOKENS_OF_A_PROMPT:
        flags = f"--n {args.n} with --max_new_tokens {args.max_new_tokens}"
        parser.error(f"{flags}: {tokens} tokens for a prompt, more than {_MOST_TOKENS_OF_A_PROMPT}; lower one of them")
    return args


_SAMPLING = (
    ("temperature", float, "temperature; 0 takes the most likely token each time"),
    ("top_p", float, "probability that the tokens have together which are drawn from"),
    ("top_k", int, "number of the most likely tokens that are drawn from; 0 is all"),
    ("repetition_penalty", float, "divides the scores of tokens of prompt and answer"),
    ("presence_penalty", float, "subtracted from the scores of tokens of the answer"),
    ("frequency_penalty", float, "subtracted as many times as a token is in the answer"),
)
# Flags that decide what the answers are; --data_format decides the prompts, which have a digest.
_DECIDING = (
    "model_name_or_path", "adapter", "chat_template", "system_message", "n", "seed", "max_new_tokens", "stop",
    "thinking", "preserve_thinking", "reasoning_effort", "kv_cache", *(name for name, _, _ in _SAMPLING),
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    set_up_logging()
    models = {"--model_name_or_path": args.model_name_or_path, "--adapter": args.adapter}
    folders = {flag: [Path(name)] for flag, name in models.items() if name is not None and Path(name).is_dir()}
    for ending in ("", ".run", ".errors"):
        check_output_file(Path(f"{args.output}{ending}"), "--output", {"--data_path": [args.data_path], **folders})
    sampling = _sampling_of(args)
    from data_utils.answer_file import AnswerFile
    from data_utils.prompts import Prompts

    prompts = Prompts(args.data_path, args.data_format)
    total = len(prompts.keys) * args.n
    if total > _MOST_ANSWERS:
        what = f"--n {args.n}: {len(prompts.keys)} prompts have {total} answers, more than {_MOST_ANSWERS}"
        raise ConfigError(what, "Lower it, or split --data_path")
    with AnswerFile(args.output, _run_of(args, prompts.digest), prompts.keys, args.n) as file:
        if not file.missing:
            show(f"{args.output} is complete{_cut_answers(file)}")
            return
        try:
            thoughts = answer_all(prompts, file, args, sampling)
        except (KeyboardInterrupt, Terminated) as error:
            raise type(error)(f"{file.count} of {total} answers are written; the same command goes on") from None
        file.finish()
    if file.failed:
        what = f"{args.output} has {file.count} of {total} answers, and {file.errors_path} why the others failed"
        fix = f"{thoughts:,} ended within their thinking: give a higher --max_new_tokens, and another --output"
        raise RunError(what + _cut_answers(file), fix if thoughts else "The same command tries them again")
    show(f"{args.output} has {file.count} of {total} answers{_cut_answers(file)}")


def _cut_answers(file: AnswerFile) -> str:
    """Return the end of a sentence about the answers of a file."""
    return f'; {file.cut:,} of them are cut off ("finish_reason": "length"), and are not trained' if file.cut else ""


def _sampling_of(args: argparse.Namespace) -> Sampling:
    from serving.requests import RequestError, Sampling

    values = {name: getattr(args, name) for name, _, _ in _SAMPLING}
    try:
        return Sampling(**values, max_tokens=args.max_new_tokens, stop=tuple(args.stop))
    except RequestError as error:
        raise ConfigError(f"--{error}") from None


def _run_of(args: argparse.Namespace, data_digest: str) -> dict[str, Any]:
    """Return what decides the answers of a run: flags, and the content of local models and of the data.

    Raises:
        ConfigError: a folder contains no weights.
    """
    from checkpoints.base_files import read_base_files
    from checkpoints.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_QUANTIZATION, BASE_ROPE, WEIGHTS
    from checkpoints.shards import fingerprint

    run = {name: getattr(args, name) for name in _DECIDING}
    if (model := Path(args.model_name_or_path)).is_dir():
        run["model_name_or_path.weights_sha256"] = fingerprint(model, WEIGHTS)
        with suppress(ValueError):  # loading reports broken files
            run["model_name_or_path.settings_sha256"] = _digest_of(read_base_files(model))
    if args.adapter is not None and (adapter := Path(args.adapter)).is_dir():
        files = [path for name in (ADAPTER_CONFIG, BASE_QUANTIZATION, BASE_ROPE) if (path := adapter / name).is_file()]
        run["adapter.weights_sha256"] = fingerprint(adapter, ADAPTER_WEIGHTS)
        run["adapter.settings_sha256"] = _digest_of({path.name: path.read_bytes() for path in files})
    return {**run, "data_sha256": data_digest}


def _digest_of(files: Mapping[str, bytes]) -> str:
    digests = [f"{name} {hashlib.sha256(content).hexdigest()}" for name, content in sorted(files.items())]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ answers


class Task(NamedTuple):
    """One answer that is to be written: its number, and the prompt's ids, or why there are none."""

    number: int
    conversation: Conversation
    prompt_ids: tuple[int, ...]
    error: Exception | None


class UnfinishedThoughtError(Exception):
    """An answer that ended within its thinking."""


def answer_all(prompts: Prompts, file: AnswerFile, args: argparse.Namespace, sampling: Sampling) -> int:
    """Write all answers that the file lacks, in their order; return how many ended within their thinking."""
    from serving.engine import Engine

    adapters = {} if args.adapter is None else {"adapter": args.adapter}
    with Engine.load(
        args.model_name_or_path, adapters, device_map=args.device_map, kv_cache=args.kv_cache,
        max_concurrency=args.max_concurrency, queue_size=1 << 30, any_base=args.any_base,
        chat_template=args.chat_template,
        model_name="model",  # a folder named like the adapter is allowed
    ) as engine:  # fmt: skip
        check_template_options(engine, args)
        loop = _Loop(engine, file, args, sampling)
        loop.run(_tasks(engine, prompts, file, args))
    return loop.unfinished_thoughts


def _tasks(engine: Engine, prompts: Prompts, file: AnswerFile, args: argparse.Namespace) -> Iterator[Task]:
    """Yield the answers that the file lacks."""
    options = template_options(args)
    family = engine.family_of(options)
    knows_thinking, has_lost_some = family.has_thinking and family.knows_thinking, False
    for index, conversation in enumerate(prompts):
        numbers = [number for number in range(index * args.n, (index + 1) * args.n) if number not in file]
        if not numbers:
            continue
        turns = conversation.turns
        if not knows_thinking and any(turn.thinking for turn in turns):
            if not has_lost_some:
                what = "the chat format %r has no thinking that is known, so it is left out of prompts and output"
                logger.warning(f"%s: {what}", conversation.where, family.name)
            turns, has_lost_some = tuple(turn._replace(thinking=None) for turn in turns), True
            conversation = replace(conversation, turns=turns)
        ids: tuple[int, ...] = ()
        error = None
        try:
            if conversation.is_text:
                ids = engine.encode(turns[0].content)
            else:
                ids = engine.render_turns(turns, conversation.tools, args.system_message, options)
        except (ConfigError, UnicodeError) as refused:
            error = refused
        for number in numbers:
            yield Task(number, conversation, ids, error)


def _always_thinks(engine: Engine) -> bool:
    """Return whether training needs thinking in every answer, because the model has no prompt without it."""
    from chat.samples import SampleRules
    from serving.formats import OptionError, TemplateOptions

    try:
        plain = engine.family_of(TemplateOptions(enable_thinking=False))
    except OptionError:
        plain = engine.family
    return SampleRules(engine.family, plain).always_thinks


class _Loop:
    """Submits tasks, some in advance, and writes their answers in the order of the tasks."""

    def __init__(self, engine: Engine, file: AnswerFile, args: argparse.Namespace, sampling: Sampling) -> None:
        self._engine, self._file, self._sampling = engine, file, sampling
        self._n, self._seed, self._limit = args.n, args.seed, args.max_new_tokens
        self._family = engine.family_of(template_options(args))
        self._always_thinks = _always_thinks(engine)
        self.unfinished_thoughts = 0
        self._adapter = None if args.adapter is None else "adapter"
        self._window = _WINDOW * args.max_concurrency

    def run(self, tasks: Iterator[Task]) -> None:
        from tqdm import tqdm

        file, running = self._file, deque[tuple[Task, "Ticket | Exception"]]()
        total = file.count + file.missing
        with tqdm(total=total, initial=file.count, desc="Answering", unit="answer", disable=None) as bar:
            while True:
                if len(running) <= self._window // 2:
                    running += self._submit(list(islice(tasks, self._window)))
                if not running:
                    return
                self._write(*running.popleft())
                bar.update()
                done, seconds = self._engine.load_now().completion_tokens, bar.format_dict["elapsed"]
                bar.set_postfix_str(f"{done / max(seconds, 1e-3):.0f} tokens/s", refresh=False)

    def _submit(self, tasks: Sequence[Task]) -> list[tuple[Task, Ticket | Exception]]:
        """Submit tasks, those of similar length after each other, and return them in their own order."""
        tickets: dict[int, Ticket | Exception] = {}
        for task in sorted(tasks, key=lambda task: -len(task.prompt_ids)):
            tickets[task.number] = self._ticket(task)
        return [(task, tickets[task.number]) for task in tasks]

    def _ticket(self, task: Task) -> Ticket | Exception:
        """Return the ticket of a task, or why it cannot be answered."""
        from serving.requests import Request, RequestError

        if task.error is not None:
            return task.error
        index, choice = divmod(task.number, self._n)
        seed = hashlib.sha256(f"{self._seed} {index} {choice}".encode()).digest()
        form = self._family.tool_form if task.conversation.tools else None
        stops = (*self._sampling.stop, *(form.stops if form else ()))
        sampling = replace(self._sampling, seed=int.from_bytes(seed[:7], "big"), stop=stops)
        try:
            return self._engine.submit(Request(task.prompt_ids, sampling, self._adapter))
        except RequestError as error:  # a prompt that is too long
            return error

    def _write(self, task: Task, ticket: Ticket | Exception) -> None:
        """Wait for an answer, and write it or its error."""
        where = task.conversation.where
        try:
            if isinstance(ticket, Exception):
                raise ticket
            answer = ticket.answer()
            record = self._record(task.conversation, answer)
        except Exception as error:
            self.unfinished_thoughts += isinstance(error, UnfinishedThoughtError)
            if self._file.failed < _SHOWN_ERRORS:
                logger.warning("%s: no answer: %s", where, one_line(error))
            self._file.add_error(task.number, where, one_line(error))
            return
        usage = {"prompt_tokens": answer.usage.prompt_tokens, "completion_tokens": answer.usage.completion_tokens}
        details = {"answer": answer.text, "finish_reason": answer.finish_reason, "usage": usage}
        self._file.add(task.number, {**record, **details})

    def _record(self, conversation: Conversation, answer: Answer) -> Record:
        """Return a conversation with its answer as a record of the format messages, or a continued text.

        An answer that is cut off has the weight 0: training would teach the model to end there.

        Raises:
            UnfinishedThoughtError: it is all thinking.
        """
        from chat.reading import ends_in_thinking, opening_of, read_answer
        from chat.turns import Turn
        from data_utils.formats import FORMATS
        from data_utils.formats.writing import write_messages
        from errors import DataError

        turns, is_cut = conversation.turns, answer.finish_reason != "stop"
        if conversation.is_text:
            return {"text": turns[0].content + answer.text, **({"train": False} if is_cut else {})}
        opening = opening_of(self._family, bool(conversation.tools), turns[-1].role == "tool")
        if ends_in_thinking(answer.text, self._family, opening):
            limit = "--max_new_tokens" if answer.usage.completion_tokens >= self._limit else "the model's context"
            raise UnfinishedThoughtError(
                f"{limit} ended the answer within its thinking, after {answer.usage.completion_tokens} tokens"
                if is_cut
                else "the model ended its answer within its thinking"
            )
        turn = read_answer(answer.text, self._family, conversation.tools, opening)
        weight = 0.0 if is_cut or (self._always_thinks and not (turn.thinking or "").strip()) else None
        turn = turn._replace(weight=weight)
        record = write_messages(replace(conversation, turns=(*turns, turn)), {})
        try:
            FORMATS["messages"].parse(record, conversation.where)
        except DataError:  # a call that no record can hold, such as one with a quotation mark in its name, stays text
            turn = Turn("assistant", answer.text, weight=weight)
            record = write_messages(replace(conversation, turns=(*turns, turn)), {})
        return record


if __name__ == "__main__":
    run_command(main, "scripts.generate")
