"""What the page fetches besides Gradio's own: the view's module and style, a view's data, maps that it asks for.

Headers keep the page to this server: no script, font or picture of another origin, no frame around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from veena_lens.app.explorer.state import Explorer
from veena_lens.app.view import page

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
CELLS = Path(__file__).with_name("cells.js")


def add_routes(app: FastAPI, explorer: Explorer, hosts: Sequence[str] | None = None) -> None:
    """The routes and headers. `hosts`: names under which the server answers; None for any."""
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.middleware("http")
    async def guard(request: Request, follow: Any) -> Response:
        response = await follow(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @app.get("/veena/view.js")
    def script() -> Response:
        return Response(page.script(), media_type="text/javascript", headers={"Cache-Control": "no-cache"})

    @app.get("/veena/cells.js")
    def cells() -> Response:
        text = CELLS.read_text(encoding="utf-8")
        return Response(text, media_type="text/javascript", headers={"Cache-Control": "no-cache"})

    @app.get("/veena/view.css")
    def style() -> Response:
        return Response(page.style(), media_type="text/css", headers={"Cache-Control": "no-cache"})

    @app.get("/veena/view/{token}")
    def payload(token: str) -> Response:
        view = explorer.view(token)
        if view is None:
            return Response("This view was replaced or its tab was closed; ask again.", status_code=404)
        return Response(view.payload(), media_type="application/octet-stream", headers={"Cache-Control": "no-store"})

    @app.get("/veena/maps/{token}")
    async def maps(token: str, request: Request) -> Response:
        try:
            found = await run_in_threadpool(explorer.maps, token, dict(request.query_params))
        except (ValueError, RuntimeError) as error:
            return Response(str(error), status_code=400, media_type="text/plain")
        if found is None:
            return Response("This view was replaced or its tab was closed; ask again.", status_code=404)
        return Response(found, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})
