"""What goes wrong while the processes of a run look for each other, in words that name the variable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from errors import ConfigError, RunError, one_line


@contextmanager
def setting_up_processes() -> Iterator[None]:
    """Name the address and the port with what torch says when the processes do not find each other.

    Raises:
        ConfigError: the port of the first process is in use.
        RunError: the first process, or one of the others, did not come.
    """
    try:
        yield
    except RuntimeError as error:
        message, name = one_line(error), type(error).__name__
        address, port = (os.environ.get(variable, "") for variable in ("MASTER_ADDR", "MASTER_PORT"))
        if "EADDRINUSE" in message or "address already in use" in message.lower():
            raise ConfigError(
                f"MASTER_PORT={port} is in use on this host", "Give another one, such as 29501, to all processes"
            ) from error
        place = f"MASTER_ADDR={address} MASTER_PORT={port}"
        if "clients joined" in message:
            raise RunError(
                f"only some of the {os.environ.get('WORLD_SIZE')} processes came to {place} ({message})",
                "Start all of them within --ddp_timeout, with the same address and port",
            ) from error
        if "gloo" in message.lower():
            raise RunError(
                f"the processes cannot connect to each other ({message})",
                "GLOO_SOCKET_IFNAME (on GPUs NCCL_SOCKET_IFNAME too) names the network interface that joins the hosts",
            ) from error
        if name in ("DistNetworkError", "DistStoreError"):
            raise RunError(
                f"the first process cannot be reached at {place} ({message})",
                "Is it the first host's address, is the port open between the hosts, has the process been started?",
            ) from error
        raise
