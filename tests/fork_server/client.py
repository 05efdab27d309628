"""Stand for a Python process that ``server.py`` forks: pass on arguments, streams and signals, end as it ends.

Usage: client.py SOCKET PYTHON ARGUMENT... If the server declines, or is gone, PYTHON itself runs the arguments.
"""

import _socket
import marshal
import os
import signal
import sys

FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def request(address: str, words: list[str]) -> int | None:
    """Return the exit code of the forked process, negative for a signal; ``None`` if there is none."""
    ignored = [int(number) for number in FORWARDED if signal.getsignal(number) is signal.SIG_IGN]
    umask = os.umask(0)
    os.umask(umask)
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.connect(address)
        folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        descriptors = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2, folder))
        body = marshal.dumps((words, dict(os.environ), ignored, umask))
        connection.sendmsg([len(body).to_bytes(8, "big")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptors)])
        os.close(folder)
        connection.sendall(body)
        if connection.recv(1) != b"+":
            return None
    except OSError:  # also a closed stream, which cannot be passed on
        return None
    for number in FORWARDED:
        if number not in ignored:
            signal.signal(number, lambda number, frame: connection.send(bytes([number])))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    reply = connection.recv(4)
    return int.from_bytes(reply, "big", signed=True) if reply else -signal.SIGKILL


def main() -> None:
    address, python, *arguments = sys.argv[1:]
    # The process may run, and its output make somebody send a signal, before the handlers that pass it on exist.
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    code = request(address, arguments)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    if code is None:
        os.execv(python, [python, *arguments])
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
        signal.pause()
    os._exit(code)


main()
