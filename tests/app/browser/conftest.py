"""A real Chromium (the system's own) and a real server; every test fails on a console error or a request elsewhere."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HERE = ("127.0.0.1", "localhost")
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ROOT = Path(__file__).parents[3]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright's client is not installed")
    program = os.environ.get("CHROMIUM") or next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine; install the system's own or name it in CHROMIUM")
    with playwright.sync_playwright() as api:
        chromium = api.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@dataclass
class Watched:
    """What pages said and asked for."""

    errors: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    allowed: tuple[str, ...] = ()  # parts of errors that a test provokes

    def check(self) -> None:
        told = [e for e in self.errors if not any(part in e for part in self.allowed)]
        assert not told, f"the console has errors: {told}"
        from urllib.parse import urlsplit

        local = [u for u in self.urls if urlsplit(u).scheme in ("http", "https", "ws", "wss")]
        away = [u for u in local if urlsplit(u).hostname not in HERE]
        assert not away, f"requests left the machine: {away}"


@pytest.fixture
def watched() -> Iterator[Watched]:
    seen = Watched()
    yield seen
    seen.check()


@pytest.fixture
def open_page(browser: Any, watched: Watched) -> Iterator[Callable[..., Any]]:
    """`open_page(url, width)`: a page in a context of its own, as another visitor would have."""
    contexts: list[Any] = []

    def open_one(url: str, width: int = 1280, **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda m: watched.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: watched.errors.append(str(e)))
        page.on("request", lambda r: watched.urls.append(r.url))
        page.on("websocket", lambda w: watched.urls.append(w.url))
        page.goto(url)
        return page

    yield open_one
    for context in contexts:
        context.close()


def start(*arguments: str) -> tuple[subprocess.Popen[bytes], str]:
    """The command `veena-lens explore` on a free port, ready to answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "veena_lens.cli", "explore", "--port", str(port), *arguments]
    process = subprocess.Popen(command, env=environment, cwd=ROOT)
    url = f"http://127.0.0.1:{port}/"
    for _ in range(240):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return process, url
        except OSError:
            time.sleep(0.25)
    process.kill()
    raise RuntimeError("the server did not answer within a minute")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Its address; uploads up to 1 MB, sweeps up to 3 MB."""
    pytest.importorskip("gradio")
    process, url = start("--max-upload-mb", "1", "--max-sweep-gb", "0.003", "--max-megapixels", "0.5")
    yield url
    stop(process)


# The contrast of every visible text with the background behind it (WCAG 2.2, 1.4.3): the worst ones.
CONTRAST = """(root) => {
  const parse = (c) => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const over = (top, below) => { const a = top[3] ?? 1; return [0, 1, 2].map((i) => top[i] * a + below[i] * (1 - a)); };
  const behind = (e) => {
    const layers = [];
    for (let n = e; n; n = n.parentElement) layers.push(parse(getComputedStyle(n).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const found = [];
  for (const e of document.querySelectorAll(root + ' *')) {
    const text = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join('');
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    if (!text || !box.width || !box.height || style.visibility !== 'visible' || +style.opacity < 1) continue;
    if (['SCRIPT', 'STYLE', 'OPTION'].includes(e.tagName) || e.closest('[disabled]')) continue;
    const ground = behind(e), ink = over(parse(style.color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), isLarge = size >= 24 || (size >= 18.66 && +style.fontWeight >= 700);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (isLarge ? 3 : 4.5)) found.push(`${text.slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""


def low_contrast(page: Any, root: str) -> list[str]:
    """Texts below WCAG AA under an element, with their contrast."""
    return page.evaluate(CONTRAST, root)
