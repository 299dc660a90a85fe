"""The server: the page, its routes and its limits under one address, on the loopback unless told otherwise."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veena_lens.app.explorer.limits import Limits

LOOPBACK = ("127.0.0.1", "localhost", "::1")
FIRST_PORT = 7860


def make_app(
    names: Sequence[str] | None = None,
    cache: str | Path | None = None,
    limits: Limits | None = None,
    host: str = "127.0.0.1",
    loading: Mapping[str, Any] | None = None,
) -> Any:
    """The web application (ASGI); `app.state.explorer` is its memory. Nothing listens yet.

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
    from veena_lens.app.explorer.routes import add_routes
    from veena_lens.app.explorer.state import Explorer
    from veena_lens.app.view import open_cache
    from veena_lens.checkpoints.bundle import bundled_names

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
    """A port that nobody listens on. Raises: ValueError where the wanted one is taken, or none is free."""
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
