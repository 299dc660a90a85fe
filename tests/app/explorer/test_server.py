"""The server keeps to itself: headers, hosts, limits, views by secret address, and words for what goes wrong."""

from __future__ import annotations

import asyncio
import socket
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch

from tests.app.explorer.conftest import NAME, QUESTION
from veena_lens import cli
from veena_lens.app.explorer import look
from veena_lens.app.explorer.server import free_port, make_app
from veena_lens.app.explorer.state import Limits, message, report_errors
from veena_lens.app.view.bundles import unpack

CALLED: list[Any] = []  # addresses that were called while the server was made and used


@pytest.fixture(scope="module", autouse=True)
def overheard() -> Iterator[None]:
    connect = socket.socket.connect

    def record(self: socket.socket, address: Any) -> None:
        CALLED.append(address)
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", record)
        yield


@pytest.fixture(scope="module")
def app() -> Any:
    async def made() -> Any:  # outside of a loop Gradio makes some that nobody closes
        return make_app([NAME])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gradio's own
        return asyncio.run(made())


@pytest.fixture
def client(app: Any) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from starlette.testclient import TestClient

        yield TestClient(app, base_url="http://127.0.0.1")


def test_page_forbids_other_origins_and_names_none(client: Any) -> None:
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and "default-src 'self'" in policy and "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    for remote in ("fonts.googleapis", "cdnjs", "cdn.jsdelivr", "huggingface.co/", "google-analytics"):
        assert remote not in answer.text
    assert '"analytics_enabled":false' in answer.text.replace(" ", "")


def test_other_host_names_are_turned_away(client: Any) -> None:
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"host": "localhost:7860"}).status_code == 200


def test_views_and_maps_answer_under_their_address_only(client: Any, app: Any) -> None:
    explorer = app.state.explorer
    session = explorer.session("a tab")
    for _ in look.ask(explorer, session, NAME, [], QUESTION, 3):
        pass
    token = explorer.show(session, "look", look.look(explorer, session)[0])
    header, _ = unpack(client.get(f"/veena/view/{token}").content)
    assert header["title"] == NAME
    maps = client.get(f"/veena/maps/{token}", params={"query": 3})
    assert unpack(maps.content)[0]["bundles"][0]["query"] == 3 and maps.headers["cache-control"] == "no-store"
    assert client.get(f"/veena/maps/{token}", params={"query": 10**6}).status_code == 400
    assert client.get(f"/veena/maps/{token}").status_code == 400
    for path in ("/veena/view/none", "/veena/maps/none?query=3"):
        answer = client.get(path)
        assert answer.status_code == 404 and "tab was closed" in answer.text
    explorer.forget("a tab")
    assert client.get(f"/veena/view/{token}").status_code == 404


def test_scripts_and_style_are_the_packages_own(client: Any) -> None:
    assert "export function mount" in client.get("/veena/view.js").text
    assert "export function cells" in client.get("/veena/cells.js").text
    assert client.get("/veena/view.css").headers["content-type"].startswith("text/css")


def test_server_itself_calls_nobody(client: Any) -> None:
    assert client.get("/config").status_code == 200
    away = [a for a in CALLED if isinstance(a, tuple) and a[0] not in ("127.0.0.1", "::1", "localhost")]
    assert not away


def test_port_that_is_taken_is_told() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(ValueError, match="Port .* is taken on 127.0.0.1; name another with --port"):
            free_port("127.0.0.1", busy.getsockname()[1])
    assert free_port("127.0.0.1", None) >= 7860


@pytest.mark.parametrize(
    ("host", "port", "text"),
    [
        ("127.0.0.1", 99999, "--port 99999 is not a port: name one from 1 to 65535"),
        ("127.0.0.1", 0, "--port 0 is not a port: name one from 1 to 65535, or leave --port out"),
        ("127.0.0.1", -1, "--port -1 is not a port"),
        ("127.0.0.1", 10**12, "is not a port"),
        ("", None, "--host '' is not an address or name that this machine knows"),
        ("  ", 8000, "--host '  ' is not an address"),
        ("no-such-host.invalid", None, "--host 'no-such-host.invalid' is not an address"),
        ("999.1.1.1", None, "--host '999.1.1.1' is not an address"),
        ("http://localhost", None, "is not an address"),
        ("a\0b", None, "is not an address"),
        ("a" * 100, None, "is not an address"),
        ("192.0.2.1", None, "This machine cannot listen on '192.0.2.1'"),
    ],
)
def test_address_that_cannot_be_is_refused_before_anything_is_made(
    host: str, port: int | None, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("veena_lens.app.explorer.server.make_app", lambda *_: pytest.fail("a page was made"))
    options = ["--host", host, *([] if port is None else ["--port", str(port)])]
    assert cli.main(["explore", *options]) == 2
    told = capsys.readouterr()
    assert text in told.err and told.err.count("\n") == 1 and not told.out


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-3", "1e-9"])
@pytest.mark.parametrize("option", ["--max-upload-mb", "--max-megapixels", "--max-sweep-gb"])
def test_limit_that_is_no_number_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    if option == "--max-sweep-gb" and value == "1e-9":
        return  # a byte and a bit
    assert cli.main(["explore", f"{option}={value}"]) == 2
    assert f"{option} {value.replace('1e-9', '1e-09')}: expected a positive number" in capsys.readouterr().err


def test_bad_cache_is_told_before_a_server_starts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No activation cache at"):
        make_app([NAME], tmp_path / "none.safetensors")


def test_errors_become_messages_without_tracebacks() -> None:
    assert message(ValueError("give two")).message == "give two"
    assert "out of memory" in str(message(torch.OutOfMemoryError("CUDA")).message)
    assert message(ZeroDivisionError("x")).message == "Unexpected error, please report it: ZeroDivisionError: x"

    @report_errors
    def one(n: int) -> int:
        if n < 0:
            raise ValueError("negative")
        return n

    @report_errors
    def many(n: int) -> Iterator[int]:
        yield n
        raise RuntimeError("half-way")

    assert one(2) == 2
    with pytest.raises(gr.Error, match="negative"):
        one(-1)
    steps = many(1)
    assert next(steps) == 1
    with pytest.raises(gr.Error, match="Unexpected error, please report it: RuntimeError: half-way"):
        next(steps)


def test_command_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    stand_in = types.ModuleType("veena_lens.app.explorer.server")
    stand_in.serve = lambda *args: asked.append(args)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "veena_lens.app.explorer.server", stand_in)
    arguments = [
        "--model",
        NAME,
        "--cache",
        "c.safetensors",
        "--port",
        "8000",
        "--max-upload-mb",
        "3",
        "--dtype",
        "bfloat16",
    ]
    assert cli.main(["explore", *arguments]) == 0
    models, cache, host, port, limits, loading = asked[0]
    assert loading == {"device": None, "dtype": torch.bfloat16}
    assert (models, cache, host, port) == ([NAME], "c.safetensors", "127.0.0.1", 8000)
    assert limits == Limits(upload_bytes=3 * 2**20)


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "./nowhere"])
def test_model_that_does_not_exist_is_told_before_a_server_starts(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: pytest.fail("a server started"))
    assert cli.main(["explore", "--model", NAME, name]) == 2
    told = capsys.readouterr()
    assert f"No checkpoint {name!r}" in told.err and "http" not in told.out


def test_missing_gradio_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["explore"]) == 2
    assert 'pip install "veena-lens[explore]"' in capsys.readouterr().err
