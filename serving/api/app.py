"""The addresses of a server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.telemetry import TelemetryConfig
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Match
from starlette.types import Scope

from serving.api.chat_completions import create_chat_completion
from serving.api.completions import create_completion
from serving.api.errors import JsonResponse, add_handlers
from serving.api.gate import Gate
from serving.api.running import Service, in_thread
from serving.api.schemas import ChatRequest, CompletionRequest
from serving.api.settings import Settings
from serving.page import page_files, page_routes

if TYPE_CHECKING:
    from serving.engine import Engine

_OPEN_PATHS = ("/health", "/page/")
_NO_TELEMETRY: TelemetryConfig = {
    "tracing": False, "metrics": False, "logs": False, "operation_spans": False, "auto_configure": False,
}  # fmt: skip


def build_app(engine: Engine, settings: Settings) -> FastAPI:
    """Return the application that answers requests with an engine. Its end closes the engine."""
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await in_thread(engine.close)

    # Without the generated pages, which load scripts from another server, and without telemetry, which variables of
    # the environment could send to one.
    app = FastAPI(
        title="Qwen", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, telemetry=_NO_TELEMETRY
    )
    app.add_middleware(
        Gate, settings=settings, metrics=service.metrics, open_paths=_OPEN_PATHS, path_of=partial(_path_of, app)
    )
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    add_handlers(app)
    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    engine = service.engine
    app.router.routes.extend(page_routes())

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await create_chat_completion(service, request, body)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await create_completion(service, request, body)

    @app.get("/v1/models")
    async def models() -> Response:
        names = [engine.model_name, *(f"{engine.model_name}:{name}" for name in engine.adapters)]
        return JsonResponse({"object": "list", "data": [_model(service, name) for name in names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        engine.adapter_of(name)
        return JsonResponse(_model(service, name))

    @app.get("/health")
    async def health() -> Response:
        load = engine.load_now()
        return JsonResponse({"status": "ok", "running": load.running, "waiting": load.waiting})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(engine.load_now()), media_type="text/plain; version=0.0.4")


def _path_of(app: FastAPI, scope: Scope) -> str:
    """Return the address that a request is for, also if it was refused before its route was looked for."""
    if scope["path"] in page_files():
        return str(scope["path"])
    for route in app.router.routes:
        if route.matches(scope)[0] is not Match.NONE:
            return str(getattr(route, "path", "other"))
    return "other"


def _model(service: Service, name: str) -> dict[str, Any]:
    family = service.engine.family
    # For the page: whether its messages may have thinking.
    thinking = {"has_thinking": family.has_thinking and family.knows_thinking}
    return {"id": name, "object": "model", "created": service.created, "owned_by": "user", **thinking}
