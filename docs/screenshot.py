"""Take the explorer's screenshot for README and docs: `python docs/screenshot.py`, with the extra `browser` installed.

It starts a server, opens the page with its sample and pins one word of the answer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PICTURE = Path(__file__).with_name("explorer.png")
PORT = 7999


def take(path: Path = PICTURE) -> Path:
    """Write the screenshot and return its path. Raises: RuntimeError without a Chromium."""
    from playwright.sync_api import sync_playwright

    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise RuntimeError("No Chromium found; set the environment variable CHROMIUM to its path.")
    command = [sys.executable, "-m", "veena_lens.cli", "explore", "--port", str(PORT)]
    server = subprocess.Popen(command)
    try:
        wait_for(f"http://127.0.0.1:{PORT}/")
        with sync_playwright() as api:
            browser = api.chromium.launch(executable_path=program, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1180, "height": 1600})
            page.goto(f"http://127.0.0.1:{PORT}/")
            page.wait_for_selector("#look-view .vv-answer")
            page.locator("#look-view .vv-answer", has_text="happy").click()
            page.wait_for_timeout(600)
            box = page.locator("#look-view").bounding_box()
            assert box is not None
            clip = {"x": 0.0, "y": 0.0, "width": 1180.0, "height": box["y"] + box["height"] + 8}
            page.screenshot(path=str(path), clip=clip)  # pyright: ignore[reportArgumentType]
            browser.close()
    finally:
        server.terminate()
        server.wait(20)
    return path


def wait_for(url: str) -> None:
    """Return once a server answers."""
    for _ in range(240):
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.25)
    raise RuntimeError(f"Nothing answers at {url}.")


if __name__ == "__main__":
    print(take())
