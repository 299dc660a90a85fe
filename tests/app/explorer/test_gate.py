"""Only the page's own requests pass, and a file named in one was uploaded here by the same visitor."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio.helpers import special_args
from gradio.routes import App
from PIL import Image

from tests.app.explorer.conftest import NAME
from veena_lens.app.explorer.gate import origin_host
from veena_lens.app.explorer.server import make_app
from veena_lens.app.explorer.state import Limits

META = {"_type": "gradio.FileData"}
FOREIGN = "was not uploaded from this tab"


def png(colour: str = "red", size: tuple[int, int] = (32, 32)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "png")
    return stream.getvalue()


@pytest.fixture(scope="module")
def app() -> Any:
    async def made() -> Any:
        return make_app([NAME], limits=Limits(upload_bytes=2**20))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gradio's own
        return asyncio.run(made())


@pytest.fixture(scope="module")
def running(app: Any) -> Iterator[Any]:
    """A visitor's client of the running server."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from starlette.testclient import TestClient

        with TestClient(app, base_url="http://127.0.0.1") as client:
            yield client


@pytest.fixture
def client(running: Any) -> Iterator[Any]:
    running.cookies.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield running


@pytest.fixture(scope="module")
def config(running: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return running.get("/config").json()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """An image of the machine that nobody uploaded."""
    path = tmp_path / "secret.png"
    path.write_bytes(png())
    return path


def uploaded(client: Any, data: bytes, name: str = "mine.png") -> str:
    answer = client.post("/gradio_api/upload", files={"files": (name, data)})
    assert answer.status_code == 200, answer.text
    return answer.json()[0]


def events(config: dict[str, Any]) -> list[tuple[int, str, list[Any]]]:
    """Each event with a file among its inputs: its number, the name of that component, and its usual data."""
    parts = {part["id"]: part for part in config["components"]}
    found = []
    for event in config["dependencies"]:
        for place, number in enumerate(event["inputs"]):
            if parts[number]["type"] == "file":
                data = [parts[n]["props"].get("value") for n in event["inputs"]]
                data[place] = None
                found.append((event["id"], parts[number]["props"]["elem_id"], [*data[:place], ..., *data[place + 1 :]]))
    return found


def join(client: Any, event: int, data: list[Any], given: Any, tab: str = "tab", **more: Any) -> Any:
    body = {"data": [given if d is ... else d for d in data], "fn_index": event, "session_hash": tab, **more}
    return client.post("/gradio_api/queue/join", json=body)


def outcome(client: Any, tab: str = "tab") -> dict[str, Any]:
    """What the page is sent at the end of a tab's event."""
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": tab}) as lines:
        for line in lines.iter_lines():
            message = json.loads(line[6:]) if line.startswith("data: ") else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("no end")


def test_every_component_refuses_files_that_were_not_uploaded(
    client: Any, config: Any, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *host, **_: asked.append(host))
    mine = uploaded(client, png("blue"))
    os.symlink(secret, Path(mine).parent / "link.png")
    ways = [
        str(secret),
        "/etc/passwd",
        "/no/such/file",
        f"file://{secret}",
        str(secret).replace("/", "%2F"),
        f"{Path(mine).parent}/../../{secret.name}",
        f"{Path(mine).parent}/./{Path(mine).name}",
        str(Path(mine).parent / "link.png"),
        str(Path(mine).parent),
        mine.upper(),
        f"{mine}\0",
        "http://example.invalid/face.png",
        "http://127.0.0.1/config",
        "",
        None,
        3,
        [mine],
    ]
    checked = events(config)
    assert {name for _, name, _ in checked} == {
        *("uploads", "cache", "pair-uploads", "circuit", "steer-upload", "own-shown", "own-twins", "own-zip")
    }
    for event, name, data in checked:
        for way in ways:
            for shape in ({"path": way, "meta": META}, [{"path": way, "meta": META}], {"path": way}):
                answer = join(client, event, data, shape)
                assert answer.status_code == 403 and FOREIGN in answer.text, (name, way)
                assert str(secret) not in answer.text
        own = {"path": mine, "meta": META}
        for hidden in ({"a": [{"path": str(secret)}]}, [own, {"path": str(secret), "meta": META}], {"url": "http://x"}):
            assert join(client, event, data, hidden).status_code == 403, (name, hidden)
        told = join(client, event, data, None, event_data={"value": [{"path": str(secret)}]})
        assert told.status_code == 403
    assert not asked, "the server looked a host up"


@pytest.mark.parametrize("tab", ["", "a b", "../x", None, 3, ["x"]])
def test_request_without_a_tab_is_refused(client: Any, config: Any, tab: Any) -> None:
    event, _, data = events(config)[0]
    assert join(client, event, data, None, tab).status_code == 400


def test_every_component_takes_what_its_visitor_uploaded(client: Any, config: Any) -> None:
    client.get("/")
    for event, name, data in events(config):
        mine = uploaded(client, png("blue"), "../../blue eyes.png")
        assert Path(mine).name == "blue eyes.png"
        given = {"path": mine, "orig_name": "../../x.png", "url": "http://example.invalid/x", "meta": META}
        answer = join(client, event, data, [given] if name in ("uploads", "pair-uploads") else given, f"of-{event}")
        assert answer.status_code == 200, (name, answer.text)
        text = json.dumps(outcome(client, f"of-{event}"))
        assert FOREIGN not in text and "example.invalid" not in text, (name, text)
        if name == "cache":
            assert "blue eyes.png" in text and str(Path(mine).parent) not in text


def test_upload_serves_one_visitor_and_one_tab(client: Any, config: Any) -> None:
    event, data = next((e, d) for e, name, d in events(config) if name == "uploads")
    client.get("/")
    first, mine = dict(client.cookies), uploaded(client, png("green"))
    given = [{"path": mine, "meta": META}]
    client.cookies.clear()
    assert join(client, event, data, given, "other").status_code == 403  # a client that shows no cookie
    client.get("/")
    assert dict(client.cookies) != first
    assert join(client, event, data, given, "other").status_code == 403
    assert client.get(f"/gradio_api/file={mine}").status_code == 404
    client.cookies.clear()
    client.cookies.update(first)
    assert join(client, event, data, given, "mine").status_code == 200
    outcome(client, "mine")
    assert join(client, event, data, given, "other").status_code == 403  # another tab
    answer = client.get(f"/gradio_api/file={mine}")
    assert answer.content == png("green") and answer.headers["content-disposition"].startswith("attachment")


def test_client_without_cookies_can_use_its_own_files(client: Any, config: Any) -> None:
    event, data = next((e, d) for e, name, d in events(config) if name == "uploads")
    mine = uploaded(client, png("green"))
    client.cookies.clear()
    assert join(client, event, data, [{"path": mine, "meta": META}], "plain").status_code == 200
    outcome(client, "plain")


def test_handlers_refuse_foreign_files_on_their_own(app: Any, config: Any, secret: Path) -> None:
    page = next(route.app for route in app.routes if isinstance(getattr(route, "app", None), App))
    handlers = page.get_blocks().fns
    for event, name, data in events(config):
        given = [str(secret)] if name in ("uploads", "pair-uploads", "own-shown", "own-twins") else str(secret)
        values = [given if d is ... else d for d in data]
        values, *_ = special_args(handlers[event].fn, values, request=gr.Request(session_hash="past the gate"))
        with pytest.raises(gr.Error, match=FOREIGN):
            result = handlers[event].fn(*values)
            list(result if inspect.isgenerator(result) else ())


ROUTES = """POST run/predict|POST api/predict|POST call/predict|POST call/v2/predict|GET call/predict/1|POST stream/1
POST component_server|GET proxy=https://x.hf.space/|GET file/etc/passwd|GET file=/etc/passwd|GET dev/reload|GET runs
GET deep_link|POST process_recording|POST vibe-edit|POST vibe-code|POST vibe-starter-queries|POST undo-vibe-edit
POST run-history/connect|GET openapi.json|GET user|GET token|GET queue/status|PUT upload|OPTIONS upload|DELETE upload
GET upload|GET file=http://example.invalid/x|GET custom_component/a/b/c/d|GET mcp/sse|GET //upload|POST upload/"""


@pytest.mark.parametrize("route", re.split(r"[|\n]", ROUTES))
def test_other_routes_are_closed(client: Any, route: str) -> None:
    method, path = route.split()
    assert client.request(method, f"/gradio_api/{path}").status_code in (404, 405)
    for outside in ("/login", "/logout", "/monitoring", "/monitoring/summary", "/docs", "/openapi.json", "/veena/../x"):
        assert client.get(outside).status_code == 404


FROM_ELSEWHERE = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1.evil.example"},
    {"origin": "http://127.0.0.1:9999"},
    {"origin": "file://127.0.0.1"},
    {"origin": "http://[::1"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"origin": "http://127.0.0.1", "sec-fetch-site": "cross-site"},
    {"origin": "https://evil.example", "x-forwarded-host": "evil.example"},
]


@pytest.mark.parametrize("headers", FROM_ELSEWHERE)
def test_pages_of_other_sites_can_send_nothing(client: Any, config: Any, headers: dict[str, str], app: Any) -> None:
    before = list((app.state.explorer.folder / "uploads").glob("*"))
    answer = client.post("/gradio_api/upload", files={"files": ("x.png", png())}, headers=headers)
    assert answer.status_code == 403 and "other sites" in answer.text
    assert "access-control-allow-origin" not in answer.headers
    assert list((app.state.explorer.folder / "uploads").glob("*")) == before
    for path in ("queue/join", "cancel", "reset"):
        assert client.post(f"/gradio_api/{path}", json={}, headers=headers).status_code == 403
    assert client.get("/gradio_api/queue/data", headers=headers).status_code == 403


def test_page_opens_from_a_link_elsewhere_and_answers_itself(client: Any) -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200
    own = {"origin": "http://127.0.0.1", "sec-fetch-site": "same-origin"}
    assert client.post("/gradio_api/reset", json={"event_id": "1"}, headers=own).status_code == 200
    assert origin_host("HTTP://LOCALHOST:80") == "localhost"


@pytest.mark.parametrize("name", ["x-forwarded-host", "x-gradio-server", "forwarded", "x-forwarded-proto", "x-host"])
def test_forwarded_headers_change_nothing(client: Any, name: str) -> None:
    value = {"forwarded": "host=evil.example;proto=https", "x-forwarded-proto": "https"}.get(name, "evil.example")
    for path in ("/", "/config"):
        text = client.get(path, headers={name: value}).text
        assert "evil.example" not in text and "https://127.0.0.1" not in text
    assert client.get("/config", headers={name: value}).json()["root"] == "http://127.0.0.1"


@pytest.mark.parametrize("body", [b"", b"[", b"[]", b"3", b'{"data": ' + b"[" * 100_000, b"\xff", b'{"data": [NaN]}'])
def test_body_that_is_not_of_the_page_is_refused(client: Any, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post("/gradio_api/queue/join", content=body, headers=headers)
    assert answer.status_code == 400 and "Traceback" not in answer.text


def test_large_requests_are_cut_short(client: Any) -> None:
    assert client.post("/gradio_api/queue/join", content=b" " * (2**21 + 1)).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 2**16

    assert client.post("/gradio_api/queue/join", content=pieces()).status_code == 413
    answer = client.post("/gradio_api/upload", files={"files": ("x.png", b"x" * (2**20 + 1))})
    assert answer.status_code == 413 and "1,048,576 bytes" in answer.text


@pytest.mark.parametrize("content", ["multipart/form-data", "multipart/form-data; boundary=x", "text/plain", "x"])
def test_broken_upload_is_refused(client: Any, content: str) -> None:
    answer = client.post("/gradio_api/upload", content=b"--x\r\nbroken", headers={"content-type": content})
    assert answer.status_code == 400 and answer.json()["detail"] and "Traceback" not in answer.text


def test_exports_lie_under_names_that_nobody_can_guess(client: Any, config: Any, app: Any) -> None:
    explorer = app.state.explorer
    parts = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    export = next(e["id"] for e in config["dependencies"] if named(e, parts) == ["patch-export", "click"])
    session = explorer.session("exporting")
    session.kept["swept"] = swept()
    assert join(client, export, [], None, "exporting").status_code == 200
    files = outcome(client, "exporting")["output"]["data"][0]["value"]
    assert len(files) == 4
    for file in files:
        assert Path(file["path"]).parent == session.folder and len(session.folder.name) >= 32
        assert client.get(f"/gradio_api/file={file['path']}").content == Path(file["path"]).read_bytes()
        assert re.fullmatch(r"(http://127\.0\.0\.1)?/gradio_api/file=.*", file["url"])
    assert not list(explorer.folder.glob("[0-9a-f]" * 64))
    assert client.get(f"/gradio_api/file={session.folder}/%2e%2e/{session.folder.name}/patching.csv").status_code == 404
    assert client.get(f"/gradio_api/file={session.folder}").status_code == 404
    explorer.forget("exporting")
    assert client.get(f"/gradio_api/file={files[0]['path']}").status_code == 404


def named(event: dict[str, Any], parts: dict[int, str]) -> list[str]:
    return [parts.get(event["targets"][0][0], ""), event["targets"][0][1]]


def swept() -> Any:
    import torch

    from veena_lens.app.explorer.patch import SweepSettings, Swept
    from veena_lens.app.explorer.pictures import open_sample, samples
    from veena_lens.scores import Scores

    scores = Scores(torch.zeros(2, 3), ("layer", "head"), {"layer": [0, 1], "head": [0, 1, 2]}, "share")
    face = open_sample(next(iter(samples())))
    settings = SweepSettings(model=NAME, clean=face, corrupted=face, prompt="how?", words=("happy", "sad"))
    return Swept(settings=settings, effects=scores.values, done=2, result=scores)


def test_folder_is_for_this_user_alone(app: Any) -> None:
    assert app.state.explorer.folder.stat().st_mode & 0o777 == 0o700


LATER = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGHUP)]


@pytest.mark.parametrize("number", [signal.SIGTERM, *LATER])
def test_signal_removes_every_folder(tmp_path: Path, number: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("GRADIO_TEMP_DIR", None)
    command = [sys.executable, "-m", "veena_lens.cli", "explore", "--port", str(port), "--model", NAME]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    for _ in range(240):
        try:
            urllib.request.urlopen(address, timeout=2).close()
            break
        except OSError:
            time.sleep(0.25)
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + png() + b"\r\n--x--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=x"}
    asked = urllib.request.Request(f"{address}gradio_api/upload", body, headers)
    with urllib.request.urlopen(asked) as answer:
        assert Path(json.load(answer)[0]).is_relative_to(tmp_path)
    process.send_signal(number)
    process.wait(30)
    assert not [p.name for p in tmp_path.iterdir()]
