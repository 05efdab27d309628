"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Settings:
    """Limits and access rules.

    Attributes:
        api_key: what clients have to send as a bearer token; ``None``: anyone who reaches the address may ask.
        allowed_hosts: names by which clients may call the server (the Host header, without the port); ``None``: any.
            Otherwise a website could have its own name point at this machine, and ask as if it were local.
        allowed_origins: websites of other origins whose scripts may ask.
        most_body_bytes: largest body of a request.
        most_tokens: longest answer; ``None``: what is left of the context.
        most_choices: most answers to one request (``n``, times its prompts).
        body_timeout: seconds in which the body of a request has to arrive.
        log_requests: log the text of requests and answers.
    """

    api_key: str | None = None
    allowed_hosts: tuple[str, ...] | None = LOOPBACK
    allowed_origins: tuple[str, ...] = ()
    most_body_bytes: int = 4 << 20
    most_tokens: int | None = None
    most_choices: int = 16
    body_timeout: float = 30.0
    log_requests: bool = False
