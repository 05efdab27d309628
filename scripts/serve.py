"""Answer requests over HTTP as OpenAI's API does: ``python -m scripts.serve --model_name_or_path DIR``.

Addresses: / (a page to chat with), /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics. Requests
that come together are answered together. Meant for one machine; docs/serving.md says what it is not meant for.

SIGTERM and Ctrl-C finish the requests that run; a second one ends them as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import os
import re
import shlex
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from commands import CommandParser, run_command, set_up_logging
from console import show
from errors import ConfigError, Terminated
from serving.flags import add_model_flags, check_packages, parse_adapters

if TYPE_CHECKING:
    from serving.api.settings import Settings
    from serving.engine import Engine

_DESCRIPTION = f"Answer requests over HTTP as OpenAI's API does.\n\n{__doc__.partition(chr(10) * 2)[2]}"
KEY_VARIABLE = "QWEN_API_KEY"
_LONGEST_KEY = 4096
_PORTS = {"http": 80, "https": 443}
_KEEP_ALIVE = 30  # seconds that a connection without a request stays open


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m scripts.serve", description=_DESCRIPTION, allow_abbrev=False)
    add_model_flags(parser, "LoRA adapter that requests choose with the model NAME; may be given several times")
    parser.add_argument("--served_model_name", metavar="NAME", help="name of the model (default: that of its folder)")

    group = parser.add_argument_group("who may ask")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1: this machine)")
    group.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    group.add_argument(
        "--api_key", metavar="KEY",
        help=f"what clients have to send; the variable {KEY_VARIABLE} keeps it out of the list of processes",
    )  # fmt: skip
    group.add_argument("--no_auth", action="store_true", help="let everyone ask who reaches --host")
    group.add_argument(
        "--allowed_host", action="append", default=[], metavar="NAME",
        help="name by which clients may call the server, beside localhost (default with another --host: any)",
    )  # fmt: skip
    group.add_argument(
        "--allow_origin", action="append", default=[], metavar="URL",
        help="website whose pages may ask, such as https://example.org (default: only the server's own page)",
    )  # fmt: skip

    group = parser.add_argument_group("limits")
    group.add_argument("--max_concurrency", type=int, default=16, help="requests answered at a time (default: 16)")
    group.add_argument("--queue_size", type=int, default=256, help="requests that may wait (default: 256)")
    group.add_argument(
        "--request_timeout", type=float, default=600.0, metavar="SECONDS",
        help="time after which an answer ends as it is (default: 600)",
    )  # fmt: skip
    group.add_argument(
        "--max_model_len", type=int, metavar="N", help="tokens of prompt and answer (default: the model's)"
    )
    group.add_argument("--max_tokens", type=int, metavar="N", help="tokens of an answer (default: what is left)")
    group.add_argument(
        "--max_request_bytes", type=int, default=4 << 20, metavar="N", help="size of a request (default: 4194304)"
    )
    parser.add_argument("--log_requests", action="store_true", help="log the texts of requests and answers")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    args = parser.parse_args(argv)
    _check_args(parser, args)
    return args


def _check_args(parser: CommandParser, args: argparse.Namespace) -> None:
    for name in ("max_concurrency", "request_timeout", "max_model_len", "max_tokens", "max_request_bytes"):
        value = getattr(args, name)
        if value is not None and not value > 0:  # not a number is neither
            parser.error(f"--{name} {value} is too small; give 1 or more")
    if args.queue_size < 0:
        parser.error(f"--queue_size {args.queue_size} is out of range; give 0 or more")
    if not 0 <= args.port < 1 << 16:
        parser.error(f"--port {args.port} is out of range; give 0 to 65535")
    if args.served_model_name == "":
        parser.error("--served_model_name is empty; give a name, or leave it out")
    args.adapters = parse_adapters(args.adapters)
    args.allowed_host = [_host_name(parser, value) for value in args.allowed_host]
    args.allow_origin = [_origin(parser, value) for value in args.allow_origin]
    _check_key(parser, args)
    if args.api_key is None and not args.no_auth and not _is_loopback(args.host):
        raise ConfigError(
            f"--host {args.host}: other machines could ask without a key",
            f"Give --api_key or set {KEY_VARIABLE}, or say --no_auth if everyone may ask",
        )


def _check_key(parser: CommandParser, args: argparse.Namespace) -> None:
    source, key = "--api_key", args.api_key
    if key is None and KEY_VARIABLE in os.environ:
        source, key = f"the variable {KEY_VARIABLE}", os.environ[KEY_VARIABLE]
    is_sendable = key is not None and key.isascii() and key.isprintable() and key == key.strip()
    if key is not None and not (is_sendable and 0 < len(key) <= _LONGEST_KEY):
        what = f"{source} cannot be sent as a key"
        parser.error(f"{what}; give 1 to {_LONGEST_KEY} printable ASCII characters, no spaces around them")
    if key is not None and args.no_auth:
        parser.error(f"--no_auth contradicts the key of {source}; leave one of them out")
    args.api_key = key


def _host_name(parser: CommandParser, value: str) -> str:
    """Return a name as the server compares it: without a port, in small letters."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(value))  # also of IPv6 without brackets
    with contextlib.suppress(ValueError):
        parts = urlsplit(f"//{value}")
        if parts.hostname and re.fullmatch(r"[\w.\[\]:-]+", value, re.ASCII) and parts.port != -1:
            return parts.hostname
    parser.error(f"--allowed_host {value} is not the name of a host; give one such as chat.example.org")


def _origin(parser: CommandParser, value: str) -> str:
    """Return a website as browsers name it: without a path and the usual port, in small letters."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(value)
        is_bare = parts.path in ("", "/") and not (parts.query or parts.fragment or "@" in parts.netloc)
        if parts.scheme in _PORTS and parts.hostname and is_bare and value.isascii() and "*" not in value:
            port = "" if parts.port in (None, _PORTS[parts.scheme]) else f":{parts.port}"
            host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
            return f"{parts.scheme}://{host}{port}"
    parser.error(f"--allow_origin {value} is not the address of a website; give one such as https://example.org")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    set_up_logging()
    logging.getLogger("serving.texts").setLevel(logging.INFO if args.log_requests else logging.ERROR)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    check_packages("fastapi", "jsonschema", "uvicorn")
    listener = _bind(args.host, args.port)  # refused before the model is read
    with listener:
        _raise_file_limit()
        from serving.engine import Engine

        engine = Engine.load(
            args.model_name_or_path,
            args.adapters,
            device_map=args.device_map,
            kv_cache=args.kv_cache,
            chat_template=args.chat_template,
            max_concurrency=args.max_concurrency,
            queue_size=args.queue_size,
            request_timeout=args.request_timeout,
            context_length=args.max_model_len,
            any_base=args.any_base,
            model_name=args.served_model_name,
        )
        with engine:
            _serve(engine, _settings(args), listener)
    show("stopped")


def _settings(args: argparse.Namespace) -> Settings:
    from serving.api.settings import LOOPBACK, Settings

    is_open = not args.allowed_host and not _is_loopback(args.host)
    return Settings(
        api_key=args.api_key,
        allowed_hosts=None if is_open else (*LOOPBACK, args.host.lower(), *args.allowed_host),
        allowed_origins=tuple(args.allow_origin),
        most_body_bytes=args.max_request_bytes,
        most_tokens=args.max_tokens,
        # A request for more answers than can run and wait would be told to try again for ever.
        most_choices=min(Settings.most_choices, args.max_concurrency + args.queue_size),
        log_requests=args.log_requests,
    )


def _serve(engine: Engine, settings: Settings, listener: socket.socket) -> None:
    """Answer requests until a signal arrives, then finish those that run."""
    import uvicorn

    from serving.api.app import build_app
    from serving.api.connection import LimitedConnection
    from serving.api.server import Server

    config = uvicorn.Config(
        build_app(engine, settings),
        http=LimitedConnection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
    )
    _show_start(engine, settings, listener)
    with contextlib.suppress(KeyboardInterrupt, Terminated):  # uvicorn raises the signal again when it has finished
        Server(config, engine).run(sockets=[listener])


def _show_start(engine: Engine, settings: Settings, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    body = f'{{"model": "{engine.model_name}", "messages": [{{"role": "user", "content": "Who are you?"}}]}}'
    key = " -H 'Authorization: Bearer KEY'" if settings.api_key is not None else ""
    access = "this machine" if _is_loopback(listener.getsockname()[0]) else "every machine that reaches it"
    show(
        f"Serving {engine.model_name} ({engine.family.name}) at {url}\n"
        f"  models: {', '.join([engine.model_name, *(f'{engine.model_name}:{name}' for name in engine.adapters)])}\n"
        f"  context: {engine.context_length} tokens, prompt and answer together\n"
        f"  may ask: {access}, {'with the API key' if settings.api_key is not None else 'without a key'}\n"
        f"  page: {url}/\n"
        f"  try: curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )
    sys.stdout.flush()


def _bind(host: str, port: int) -> socket.socket:
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)  # without the protocol asyncio would delay small packets
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        what = f"--host {host} --port {port}: cannot be listened on ({getattr(error, 'strerror', error)})"
        raise ConfigError(what, "Choose another --port, or an address of this machine") from None


def _raise_file_limit() -> None:
    """Allow as many open connections as the system lets this process have."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    run_command(main, "scripts.serve")
