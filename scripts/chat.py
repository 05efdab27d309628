"""Chat with a model in the terminal: ``python -m scripts.chat --model_name_or_path DIR``.

Enter sends a message, Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D leaves, and :help shows the commands.
If input or output is not a terminal, each line of the input is a message and only answers are printed to stdout; the
exit code is 1 if a line was refused.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from commands import CommandParser, run_command, set_up_logging
from serving.flags import (
    add_model_flags,
    add_template_flags,
    check_packages,
    check_template_options,
    parse_adapters,
)

_DESCRIPTION = f"Chat with a model in the terminal.\n\n{__doc__.partition(chr(10) * 2)[2]}"


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m scripts.chat", description=_DESCRIPTION, allow_abbrev=False)
    add_model_flags(parser, "LoRA adapter, for :adapter NAME; the first of several answers at the start")
    parser.add_argument("--system_message", help="system message (default: that of the model's chat format)")
    for name, kind, text in (
        ("temperature", float, "0 takes the most likely token (default: the checkpoint's value)"),
        ("top_p", float, "probability of the tokens that are drawn from (default: the checkpoint's value)"),
        ("seed", int, "equal seeds give equal answers (default: random)"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument(
        "--max_new_tokens", "--max_tokens", type=int,
        help="length limit of an answer (default: the checkpoint's, or what is left)",
    )  # fmt: skip
    add_template_flags(parser)
    parser.add_argument("--history_file", type=Path, help="file of earlier lines (default: in the user's state folder)")
    parser.add_argument("--no_history", action="store_true", help="keep no file of earlier lines")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    args = parser.parse_args(argv)
    args.adapters = parse_adapters(args.adapters)
    if args.history_file is not None and args.no_history:
        parser.error("--history_file contradicts --no_history; leave one of them out")
    return args


def main(argv: Sequence[str]) -> int:
    args = parse_args(argv)
    check_packages("prompt_toolkit", "rich")
    set_up_logging()
    from serving.engine import Engine
    from serving.requests import Sampling
    from serving.terminal.loop import converse
    from serving.terminal.screens import TerminalScreen, open_screen
    from serving.terminal.session import Session

    sampling = Sampling(args.temperature, args.top_p, seed=args.seed, max_tokens=args.max_new_tokens)
    history = None if args.no_history else args.history_file or default_history()
    screen = open_screen(history)
    with Engine.load(
        args.model_name_or_path, args.adapters, device_map=args.device_map, kv_cache=args.kv_cache, max_concurrency=1,
        any_base=args.any_base, chat_template=args.chat_template,
    ) as engine:  # fmt: skip
        options = check_template_options(engine, args)
        session = Session(engine, sampling, args.system_message, next(iter(args.adapters), None), options)
        screen.show_note(f"{engine.model_name}; :help shows the commands")
        all_answered = converse(session, screen)
    # Who types sees what was refused; who pipes needs the exit code.
    return 0 if all_answered or isinstance(screen, TerminalScreen) else 1


def default_history() -> Path:
    """Return the file of earlier lines in the user's folder for such files."""
    folder = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(folder).expanduser() / "qwen-finetune" / "chat_history"


if __name__ == "__main__":
    run_command(main, "scripts.chat", prints_result=True)
