"""The page that the server shows in a browser: static files, held in memory, under a strict content security policy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Only files of this server, no inline script or style, no frames; and no text that becomes markup (trusted types), so
# that what a model wrote stays text even if the page had a fault.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


@dataclass(frozen=True)
class PageFile:
    body: bytes
    headers: dict[str, str]


@cache
def page_files() -> dict[str, PageFile]:
    """Return the files by the path of their request; others do not exist, whatever a request names."""
    files = {}
    for path in sorted(Path(__file__).parent.iterdir()):
        if path.suffix in MEDIA_TYPES:
            body = path.read_bytes()
            file = PageFile(body, _headers(MEDIA_TYPES[path.suffix], body))
            files["/" if path.name == "index.html" else f"/page/{path.name}"] = file
    return files


def _headers(media_type: str, body: bytes) -> dict[str, str]:
    return {
        "content-type": media_type,
        "content-security-policy": CONTENT_SECURITY_POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        # Asked for each time, sent only if it changed: files of two versions never meet.
        "cache-control": "no-cache",
        "etag": f'"{sha256(body).hexdigest()[:32]}"',
    }


def page_routes() -> list[Route]:
    """Build one route per file, for a Starlette or FastAPI application."""
    from starlette.routing import Route

    return [Route(path, _endpoint(file), methods=["GET", "HEAD"]) for path, file in page_files().items()]


def _endpoint(file: PageFile) -> Callable[[Request], Awaitable[Response]]:
    from starlette.responses import Response

    async def respond(request: Request) -> Response:
        if request.headers.get("if-none-match") == file.headers["etag"]:
            return Response(status_code=304, headers=file.headers)
        return Response(file.body, headers=file.headers)

    return respond
