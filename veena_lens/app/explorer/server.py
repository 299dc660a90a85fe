"""The server: the page, its routes and its limits under one address, by default on the loopback.

In addition to Gradio's requests the page fetches the view's module and style, a view's data, and maps that it asks for.
Headers keep the page to this server: no script, font or image of another origin, no frame around it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from veena_lens.app.explorer.state import Explorer, Limits
from veena_lens.app.view import page

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
CELLS = Path(__file__).with_name("cells.js")


def add_routes(app: FastAPI, explorer: Explorer, hosts: Sequence[str] | None = None) -> None:
    """Add the routes and headers. `hosts`: names under which the server answers; None for any."""
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


LOOPBACK = ("127.0.0.1", "localhost", "::1")
FIRST_PORT = 7860


def make_app(
    names: Sequence[str] | None = None,
    cache: str | Path | None = None,
    limits: Limits | None = None,
    host: str = "127.0.0.1",
    loading: Mapping[str, Any] | None = None,
) -> Any:
    """Make the web application (ASGI); `app.state.explorer` is its memory. Nothing listens yet.

    names: models to choose from, the first one chosen (None: the embedded ones). cache: a file that the page opens.
    loading: settings of `HookedVLM.from_pretrained`, such as device and dtype.
    Raises: ImportError without Gradio; FileNotFoundError or ValueError for a cache that cannot be opened."""
    # Gradio reads these when it is imported: no report of use, no look for a newer version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError('The explorer needs Gradio: pip install "veena-lens[explore]".') from error
    from fastapi import FastAPI

    from veena_lens.app.explorer.page import ALWAYS_LIGHT, CSS, HEAD, build_page, page_theme
    from veena_lens.app.explorer.state import Explorer
    from veena_lens.app.view import open_cache
    from veena_lens.checkpoints.files import bundled_names

    limits = limits or Limits()
    if cache is not None:
        open_cache(cache)  # says what is wrong before a server starts
    explorer = Explorer(list(names or bundled_names()), limits, None if cache is None else Path(cache), loading)
    demo = build_page(explorer)
    demo.queue(max_size=limits.queue, default_concurrency_limit=2, api_open=False)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.explorer = explorer
    add_routes(app, explorer, [*LOOPBACK, "[::1]"] if host in LOOPBACK else None)
    return gr.mount_gradio_app(
        app,
        demo,
        path="/",
        server_name=host,
        footer_links=[],
        show_error=True,
        max_file_size=limits.upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        theme=page_theme(),
        css=CSS,
        head=HEAD,
        js=ALWAYS_LIGHT,
    )


def serve(
    names: Sequence[str] | None = None,
    cache: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    limits: Limits | None = None,
    loading: Mapping[str, Any] | None = None,
) -> None:
    """Serve the page until interrupted. port: None takes the first free one from 7860.

    Raises: as `make_app`; ValueError for a port that is taken."""
    app = make_app(names, cache, limits, host, loading)
    import uvicorn

    chosen = free_port(host, port)
    print(f"veena-lens explore: http://{'localhost' if host in LOOPBACK else host}:{chosen}", flush=True)
    if host not in LOOPBACK:
        print("Anyone who reaches this machine can use the page: it has no password.", flush=True)
    # Open pages keep a connection: without a limit the server would wait for them to close.
    uvicorn.run(app, host=host, port=chosen, log_level="warning", timeout_graceful_shutdown=1)


def free_port(host: str, port: int | None) -> int:
    """Find a port that nobody listens on. Raises: ValueError where the wanted one is taken, or none is free."""
    for candidate in [port] if port is not None else range(FIRST_PORT, FIRST_PORT + 100):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError:
                continue
            return candidate
    wanted = f"Port {port} is taken" if port is not None else f"No port from {FIRST_PORT} to {FIRST_PORT + 99} is free"
    raise ValueError(f"{wanted} on {host}; name another with --port.")
