"""Fork Python processes that have already imported the libraries, but no module of this repository.

Usage: server.py SOCKET PYTHON. It ends when its stdin does, and kills what it has started. See ``__init__.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import marshal
import os
import resource
import runpy
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = (
    "torch", "transformers.trainer", "transformers.models.auto.modeling_auto", "peft", "accelerate", "datasets",
    "safetensors.torch", "tokenizers", "tiktoken", "matplotlib.pyplot", "deepspeed", "torch.distributed.run",
)  # fmt: skip
# Variables that libraries read while they are imported: with another value a process has to import them itself.
IMPORT_PREFIXES = (
    *("ACCELERATE_", "BITSANDBYTES_", "BNB_", "DS_", "HF_", "HOME", "LANG", "LC_", "LD_", "MALLOC_", "MKL_"),
    *("MPL", "OMP_", "OPENBLAS_", "PYTHON", "PYTORCH_", "TORCH_", "TOKENIZERS_", "TRANSFORMERS_", "USE_", "XDG_"),
)
NOT_AT_IMPORT = (
    *("OMP_NUM_THREADS", "PYTHON_EXEC", "PYTHONPATH", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
)
# Set by the commands themselves before they import, so that libraries are quiet where stderr is no terminal.
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)


@dataclass
class Request:
    """What a client asks for.

    Attributes:
        client: its process id.
        words: arguments of ``python``.
        variables: its environment.
        ignored: signals that it ignores.
        umask: its umask.
        descriptors: of its stdin, stdout, stderr and folder.
    """

    client: int
    words: list[str]
    variables: dict[str, str]
    ignored: list[int]
    umask: int
    descriptors: list[int]

    def close(self) -> None:
        for number in self.descriptors:
            os.close(number)


def receive(connection: socket.socket) -> Request:
    client, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    head, descriptors, _, _ = socket.recv_fds(connection, 8, 4)
    body = b""
    while len(body) < int.from_bytes(head, "big"):
        body += connection.recv(1 << 20)
    return Request(client, *marshal.loads(body), descriptors)


def read_at_import(variables: dict[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in variables.items()
        if name.startswith(IMPORT_PREFIXES) and name not in NOT_AT_IMPORT and name not in QUIET
    }


def can_fork(request: Request, imported: dict[str, str]) -> bool:
    """Return whether a forked process would behave like a new one."""
    words = [word for word in request.words[:2] if word != "-u"]
    return (
        len(request.descriptors) == 4
        and bool(words)
        and (words[0] in ("-c", "-m") or not words[0].startswith("-"))
        and read_at_import(request.variables) == imported
        and not any(name.startswith(("PMI_", "PMIX_")) for name in request.variables)  # they inherit more than streams
        and not os.isatty(request.descriptors[2])
        and all(resource.prlimit(request.client, limit) == resource.getrlimit(limit) for limit in LIMITS)
    )


@dataclass
class Process:
    """A forked process: its id, a descriptor of it, and the file that names it after its client."""

    number: int
    descriptor: int
    file: Path

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.descriptor, number)


class Server:
    """Forks a process for each request and reports how it ended."""

    def __init__(self, address: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(64)
        self.folder = Path(address).parent
        self.imported = read_at_import(dict(os.environ))
        self.selector = selectors.DefaultSelector()
        self.processes: dict[socket.socket, Process] = {}

    def serve(self) -> Request | None:
        """Return in every forked process, with its request; in this process at the end, with ``None``."""
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == 0:
                    for process in self.processes.values():
                        process.send(signal.SIGKILL)
                    return None
                if key.fileobj is self.listener:
                    if request := self.accept():
                        return request
                elif isinstance(key.fileobj, socket.socket):
                    self.pass_on_signals(key.fileobj)
                else:
                    self.report(key.data)

    def accept(self) -> Request | None:
        """Fork; return the request in the new process."""
        connection, _ = self.listener.accept()
        try:
            request = receive(connection)
        except (OSError, ValueError, EOFError):  # the client was killed meanwhile
            connection.close()
            return None
        if not can_fork(request, self.imported):
            connection.close()
            request.close()
            return None
        child = os.fork()
        if child == 0:
            self.close()
            connection.close()
            return request
        request.close()
        file = self.folder / str(request.client)
        file.write_text(str(child))
        process = self.processes[connection] = Process(child, os.pidfd_open(child), file)
        self.selector.register(process.descriptor, selectors.EVENT_READ, connection)
        self.selector.register(connection, selectors.EVENT_READ)
        with contextlib.suppress(OSError):
            connection.send(b"+")
        return None

    def close(self) -> None:
        """Close everything that belongs to the server, in a process that is not the server."""
        for key in list(self.selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
            elif key.fd != 0:
                os.close(key.fd)
        self.selector.close()

    def pass_on_signals(self, connection: socket.socket) -> None:
        """Send the process the signals that its client has got; without a client it is killed."""
        numbers = b""
        with contextlib.suppress(OSError):
            numbers = connection.recv(16)
        if not numbers:
            self.selector.unregister(connection)
        for number in numbers or bytes([signal.SIGKILL]):
            self.processes[connection].send(number)

    def report(self, connection: socket.socket) -> None:
        """Tell the client how its process has ended."""
        process = self.processes.pop(connection)
        code = os.waitstatus_to_exitcode(os.waitpid(process.number, 0)[1])
        with contextlib.suppress(OSError):
            connection.send(code.to_bytes(4, "big", signed=True))
        for file in (process.descriptor, connection):
            with contextlib.suppress(KeyError):
                self.selector.unregister(file)
        os.close(process.descriptor)
        connection.close()
        process.file.unlink(missing_ok=True)


def become(request: Request, python: str) -> list[str]:
    """Turn this process into the one that was asked for, and return the words that say what it runs."""
    libc = ctypes.CDLL(None, use_errno=True)
    for namespace in ("net", "uts"):
        theirs, ours = f"/proc/{request.client}/ns/{namespace}", f"/proc/self/ns/{namespace}"
        if os.readlink(theirs) != os.readlink(ours):
            with open(theirs) as file:
                if libc.setns(file.fileno(), 0):
                    raise OSError(ctypes.get_errno(), f"setns {theirs}")
    for number in range(3):
        os.dup2(request.descriptors[number], number)
    os.fchdir(request.descriptors[3])
    request.close()
    os.umask(request.umask)
    for signal_number in request.ignored:
        signal.signal(signal_number, signal.SIG_IGN)
    os.environ.clear()
    os.environ |= request.variables
    tempfile.tempdir = None  # TMPDIR decides
    is_unbuffered = request.words[0] == "-u" or bool(request.variables.get("PYTHONUNBUFFERED"))
    sys.orig_argv = [python, *request.words]
    sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=is_unbuffered)
    sys.path[:0] = [entry for entry in request.variables.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if torch := sys.modules.get("torch"):
        threads = request.variables.get("OMP_NUM_THREADS", "").split(",")[0]
        torch.set_num_threads(int(threads or os.cpu_count() or 1))
        sys.modules["numpy"].random.seed()
    return request.words[request.words[0] == "-u" :]


def run(words: list[str]) -> None:
    """Run a script, ``-m`` a module or ``-c`` code as the interpreter does."""
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    main = types.ModuleType("__main__")
    if words[0] == "-c":
        source, name = words.pop(1), "<string>"
        sys.path.insert(0, "")
    else:
        name = words[0]
        source, main.__file__ = Path(name).read_bytes(), os.path.abspath(name)
        sys.path.insert(0, os.path.dirname(os.path.realpath(name)))
    sys.argv = words
    sys.modules["__main__"] = main
    exec(compile(source, name, "exec"), main.__dict__)


def main() -> None:
    address, python = sys.argv[1:]
    server = Server(address)  # requests wait while it imports
    os.environ |= QUIET
    del sys.path[0]
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    sys.stdout.flush()
    sys.stderr.flush()
    request = server.serve()
    if request is None:
        shutil.rmtree(server.folder, ignore_errors=True)
        os._exit(0)
    run(become(request, python))


main()
