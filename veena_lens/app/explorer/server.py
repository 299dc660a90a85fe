"""The server: the page, its routes and its limits under one address, by default on the loopback.

In addition to Gradio's requests the page fetches the view's module and style, a view's data, and maps that it asks for.
Headers keep the page to this server: no script, font or image of another origin, no frame around it.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse
from starlette.datastructures import UploadFile
from starlette.middleware.trustedhost import TrustedHostMiddleware

from veena_lens.app.explorer.gate import API, FILE, UPLOAD, Gate
from veena_lens.app.explorer.state import Explorer, Limits, message
from veena_lens.app.view import page

CELLS = Path(__file__).with_name("cells.js")
MOST_FILES = 1000  # of one upload


def add_routes(app: FastAPI, explorer: Explorer, hosts: Sequence[str] | None = None) -> None:
    """Add the gate and the routes. `hosts`: names under which the server answers; None for any."""
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    limits = explorer.limits
    most = max(limits.unpacked_bytes, limits.upload_bytes) + 2**20  # of all files of one request
    app.add_middleware(Gate, uploads=explorer.uploads, most_upload=most)
    add_file_routes(app, explorer)

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
        except Exception as error:
            return Response(message(error).message, status_code=400, media_type="text/plain")
        if found is None:
            return Response("This view was replaced or its tab was closed; ask again.", status_code=404)
        return Response(found, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})


def add_file_routes(app: FastAPI, explorer: Explorer) -> None:
    """Add how files come and go. They stand in front of Gradio's own, whose names follow from what a file holds."""

    @app.post(UPLOAD)
    async def upload(request: Request) -> Response:
        limit, stored = explorer.limits.upload_bytes, []
        try:
            async with request.form(max_files=MOST_FILES, max_fields=0) as form:
                files = [file for file in form.getlist("files") if isinstance(file, UploadFile)]
                if not files:
                    return JSONResponse({"detail": "The upload holds no file."}, status_code=400)
                if any((file.size or 0) > limit for file in files):
                    text = f"A file has more than {limit:,} bytes, the limit here."
                    return JSONResponse({"detail": text}, status_code=413)
                for file in files:
                    name, visitor = file.filename or "", request.scope["veena.visitor"]
                    stored.append(await run_in_threadpool(explorer.uploads.store, name, file.file, visitor))
        except ValueError:
            return JSONResponse({"detail": "The upload cannot be read."}, status_code=400)
        return JSONResponse(stored)

    @app.get(f"{API}/upload_progress")
    def progress() -> Response:
        # The answer to the upload itself says when it is there.
        return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    @app.get(f"{FILE}{{path:path}}")
    def download(path: str, request: Request) -> Response:
        found = explorer.exported(path) or explorer.uploads.find(path, request.scope["veena.visitor"])
        if found is None or not found.is_file():
            return JSONResponse({"detail": "There is no such file here."}, status_code=404)
        return FileResponse(found, filename=found.name, media_type="application/octet-stream")


LOOPBACK = ("127.0.0.1", "localhost", "::1")
FIRST_PORT, MOST_PORTS = 7860, 65535


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
    Raises: ImportError without Gradio; FileNotFoundError or ValueError for a model that does not exist or cannot be
    read, or a cache that cannot be opened."""
    # Gradio reads these when it is imported: no report of use, no look for a newer version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # nor a copy of what was asked, kept by the browser
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError('The explorer needs Gradio: pip install "veena-lens[explore]".') from error
    from fastapi import FastAPI

    from veena_lens.app.explorer.page import CSS, HEAD, build_page, page_theme
    from veena_lens.app.explorer.state import Explorer
    from veena_lens.app.explorer.status import LISTEN
    from veena_lens.app.view import open_cache
    from veena_lens.checkpoints.files import bundled_names

    limits = limits or Limits()
    for name in names or ():
        require_model(name)
    if cache is not None:
        open_cache(cache)  # says what is wrong before a server starts
    explorer = Explorer(list(names or bundled_names()), limits, None if cache is None else Path(cache), loading)
    demo = build_page(explorer)
    demo.queue(max_size=limits.queue, default_concurrency_limit=2, api_open=False)
    # Gradio leaves files of this folder where they are; others it would copy to names that follow from what they hold.
    for block in demo.blocks.values():
        block.GRADIO_CACHE = str(explorer.folder)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        explorer.open()
        try:
            yield
        finally:
            explorer.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
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
        js=LISTEN,
    )


def require_model(name: str) -> None:
    """Read a model's configuration, before a server starts that would fail at its first use; no weight is read.

    Raises: as `HookedVLM.from_pretrained` for a name that does not exist, or an architecture that is not known."""
    from veena_lens import checkpoints
    from veena_lens.checkpoints.files import bundled_names

    if name not in bundled_names():
        checkpoints.open_checkpoint(checkpoints.base_of(name) if checkpoints.is_lora_folder(name) else name)


def serve(
    names: Sequence[str] | None = None,
    cache: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    limits: Limits | None = None,
    loading: Mapping[str, Any] | None = None,
) -> None:
    """Serve the page until interrupted. port: None takes the first free one from 7860.

    Raises: as `make_app`; ValueError for a port that is taken, or an address that is not this machine's."""
    chosen = free_port(host, port)
    app = make_app(names, cache, limits, host, loading)
    import uvicorn

    end_on_signals(app.state.explorer)
    print(f"veena-lens explore: http://{'localhost' if host in LOOPBACK else host}:{chosen}", flush=True)
    if host not in LOOPBACK:
        print("Anyone who reaches this machine can use the page: it has no password.", flush=True)
    # Open pages keep a connection: without a limit the server would wait for them to close.
    settings: dict[str, Any] = {"log_level": "warning", "timeout_graceful_shutdown": 1, "proxy_headers": False}
    try:
        uvicorn.run(app, host=host, port=chosen, **settings)
    finally:
        leave(app.state.explorer)


def leave(explorer: Explorer) -> None:
    """Delete the visitors' files, and the empty folders that Gradio makes."""
    explorer.close()
    within = Path(os.environ.get("GRADIO_TEMP_DIR") or explorer.folder.parent / "gradio")
    for folder in (within / "vibe_edit_history", within):
        with suppress(OSError):  # not there, or another program's files lie in it
            folder.rmdir()


def end_on_signals(explorer: Explorer) -> None:
    """Delete the visitors' files when the process is ended, then end as the signal asks."""

    def end(number: int, _: FrameType | None) -> None:
        leave(explorer)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    for name in ("SIGTERM", "SIGHUP"):  # the second when the terminal closes
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), end)


def free_port(host: str, port: int | None) -> int:
    """Find a port that nobody listens on.

    Raises: ValueError for an address that is not this machine's, a number that is not a port, or where the wanted port
    is taken or none is free."""
    family = family_of(host)
    if port is not None and not 1 <= port <= MOST_PORTS:
        raise ValueError(
            f"--port {port} is not a port: name one from 1 to {MOST_PORTS}, or leave --port out for the first free one "
            f"from {FIRST_PORT}."
        )
    for candidate in [port] if port is not None else range(FIRST_PORT, FIRST_PORT + 100):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                if error.errno in (errno.EACCES, errno.EPERM):
                    raise ValueError(
                        f"Port {candidate} needs rights that you do not have; name one from 1024."
                    ) from None
                raise ValueError(
                    f"This machine cannot listen on {host!r} ({error.strerror or error}); --host takes one of its own "
                    "addresses, such as 127.0.0.1."
                ) from None
            return candidate
    wanted = f"Port {port} is taken" if port is not None else f"No port from {FIRST_PORT} to {FIRST_PORT + 99} is free"
    raise ValueError(f"{wanted} on {host}; name another with --port.")


def family_of(host: str) -> socket.AddressFamily:
    """Return whether a host is an IPv4 or IPv6 address. Raises: ValueError for a name that leads nowhere."""
    try:
        if not host.strip():
            raise ValueError
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except (OSError, ValueError):  # the second for a name that cannot be written as one
        raise ValueError(
            f"--host {host!r} is not an address or name that this machine knows; --host takes one of its own "
            "addresses, such as 127.0.0.1."
        ) from None
