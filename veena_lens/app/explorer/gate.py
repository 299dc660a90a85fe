"""The gate in front of the page: which requests pass, from where, and with which files.

It lets the page's own requests through and no other route of Gradio; turns away what another site's page sends; and
reads each JSON body before Gradio does, so that a file named in it is one that the same visitor uploaded here.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veena_lens.app.explorer.uploads import ForeignFile, Uploads, Visitor

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
API = "/gradio_api"
JOIN, UPLOAD, FILE = f"{API}/queue/join", f"{API}/upload", f"{API}/file="
READ = {
    "/",
    "/config",
    "/theme.css",
    "/favicon.ico",
    "/manifest.json",
    "/robots.txt",
    f"{API}/app_id",
    f"{API}/info",
    f"{API}/queue/data",
    f"{API}/startup-events",
    f"{API}/theme.css",
    f"{API}/upload_progress",
}
READ_UNDER = ("/assets/", "/static/", "/svelte/", "/veena/", f"{API}/heartbeat/", FILE)
WRITTEN = {JOIN, UPLOAD, f"{API}/cancel", f"{API}/reset"}
# What a request of the page holds; a body with anything else loses it.
FIELDS = ("data", "event_data", "fn_index", "session_hash", "trigger_id", "event_id")
# Headers by which a proxy, or whoever pretends to be one, names another host than that of the request.
FORWARDED = ("forwarded", "via", "x-")

MOST_BODY = 2 * 2**20  # of a JSON body, in bytes
COOKIE = "veena_visitor"
KEY = re.compile(r"[A-Za-z0-9_-]{22,64}")
SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Gate:
    """The gate of an application (ASGI)."""

    def __init__(self, app: ASGIApp, uploads: Uploads, most_upload: int) -> None:
        """Guard `app`. most_upload: of all files of one request together, in bytes."""
        self.app, self.uploads, self.most_upload = app, uploads, most_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        visitor = visitor_of(Headers(scope=scope))
        answer = signed(send, visitor if scope["path"] in ("/", UPLOAD) else None)
        try:
            require_own_page(scope)
            require_known_route(scope)
            passed = {**scope, "headers": plain_headers(scope), "veena.visitor": visitor}
            if scope["path"] in ("/", "/config"):
                passed["query_string"] = b""  # links into stored states, which the page does not have
            if scope["path"] == UPLOAD:
                receive = limited(receive, Headers(scope=scope), self.most_upload)
            elif scope["method"] == "POST":
                body = self.checked(await read(receive, Headers(scope=scope)), visitor, scope["path"])
                receive = replayed(body, receive)
                length = (b"content-length", str(len(body)).encode())
                passed["headers"] = [pair for pair in passed["headers"] if pair[0] not in LENGTHS] + [length]
        except HTTPException as error:
            await JSONResponse({"detail": error.detail}, error.status_code)(scope, receive, answer)
            return
        await self.app(passed, receive, answer)

    def checked(self, body: bytes, visitor: Visitor, path: str) -> bytes:
        """Return a JSON body with the fields of the page alone, and files as they were stored here.

        Raises: HTTPException for a body that is not JSON, has no tab, or names any other file."""
        try:
            found = json.loads(body, parse_constant=no_number, parse_float=number)
            fields = {name: found[name] for name in FIELDS if name in found}
            session = fields.get("session_hash")
            if path == JOIN and not (isinstance(session, str) and SESSION.fullmatch(session)):
                raise HTTPException(400, "The request names no tab.")
            return json.dumps(self.files(fields, str(session), visitor)).encode()
        except ForeignFile as error:
            raise HTTPException(403, str(error)) from None
        except (ValueError, TypeError, RecursionError):
            raise HTTPException(400, "The request is not one of this page.") from None

    def files(self, value: Any, session: str, visitor: Visitor) -> Any:
        """Return a value with each file in it, however deep, as it was stored. Raises: ForeignFile for another one."""
        if isinstance(value, list):
            return [self.files(item, session, visitor) for item in value]
        if not isinstance(value, dict):
            return value
        if "path" in value or "meta" in value or "url" in value:
            name = value.get("orig_name")
            return {
                "path": self.uploads.lend(value.get("path"), session, visitor),
                "orig_name": name if isinstance(name, str) else None,
                "meta": {"_type": "gradio.FileData"},
            }
        return {key: self.files(item, session, visitor) for key, item in value.items()}


LENGTHS = (b"content-length", b"transfer-encoding")


def no_number(text: str) -> float:
    """Raises: ValueError for NaN and infinities, which no component of the page sends."""
    raise ValueError(text)


def number(text: str) -> float:
    """Return a number of a body. Raises: ValueError for one so large that it becomes infinite."""
    value = float(text)
    return value if math.isfinite(value) else no_number(text)


def visitor_of(headers: Headers) -> Visitor:
    """Return the browser that sends a request, by its cookie; one without gets a key of its own."""
    try:
        sent = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        sent = None
    if sent is not None and KEY.fullmatch(sent.value):
        return Visitor(sent.value, is_new=False)
    return Visitor(secrets.token_urlsafe(24), is_new=True)


def plain_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """Return the headers without those of a proxy: links lead to the host that was asked, and nowhere else."""
    return [(name, value) for name, value in scope["headers"] if not name.decode("latin-1").startswith(FORWARDED)]


def require_own_page(scope: Scope) -> None:
    """Turn away what another site's page sends. Raises: HTTPException.

    A browser says where a request comes from by Origin or Sec-Fetch-Site; other programs send neither."""
    headers = Headers(scope=scope)
    opens = scope["method"] in ("GET", "HEAD") and headers.get("sec-fetch-mode", "navigate") == "navigate"
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    is_foreign = any(origin_host(origin) not in [host_name(h) for h in hosts[:1]] for origin in origins)
    site = headers.get("sec-fetch-site", "none")
    if is_foreign or (site not in ("same-origin", "none") and not (opens and scope["path"] == "/")):
        raise HTTPException(403, "Requests from pages of other sites are not answered.")


def origin_host(origin: str) -> str:
    """Return host and port of an origin; "" for none, as that of a page from a file."""
    try:
        parts = urlsplit(origin.strip())
        return host_name(parts.netloc) if parts.scheme in ("http", "https") else ""
    except ValueError:
        return ""


def host_name(host: str) -> str:
    """Return host and port in lower case, the ports of http and https left out."""
    return re.sub(r":(80|443)$", "", host.strip().lower())


def require_known_route(scope: Scope) -> None:
    """Raises: HTTPException for every request that the page does not make."""
    path, method = scope["path"], scope["method"]
    strange = "\\" in path or "\0" in path or any(part in ("..", ".") for part in path.split("/"))
    known = path in WRITTEN if method == "POST" else path in READ or path.startswith(READ_UNDER)
    if strange or not known:
        raise HTTPException(404, "There is nothing here.")
    if method not in ("GET", "HEAD", "POST"):
        raise HTTPException(405, "This page asks with GET and POST alone.")


async def read(receive: Receive, headers: Headers) -> bytes:
    """Return the body of a request. Raises: HTTPException for a larger one than `MOST_BODY`, or one that breaks off."""
    receive = limited(receive, headers, MOST_BODY)
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise HTTPException(400, "The request broke off.")
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def limited(receive: Receive, headers: Headers, most: int) -> Receive:
    """Return `receive` for a body of at most `most` bytes. Raises: HTTPException for a larger one, then as it comes."""
    too_large = HTTPException(413, f"The request has more than {most:,} bytes, the limit here.")
    if headers.get("content-length", "0").isdecimal() and int(headers.get("content-length", "0")) > most:
        raise too_large
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise too_large
        return message

    return counted


def replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body which was read before, then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


def signed(send: Send, visitor: Visitor | None) -> Send:
    """Return `send` with the headers that keep the page to this server, and the cookie of a new visitor."""

    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Content-Security-Policy"] = POLICY
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "no-referrer"
            if visitor is not None and visitor.is_new:
                headers.append("Set-Cookie", f"{COOKIE}={visitor.key}; HttpOnly; SameSite=Lax; Path=/")
        await send(message)

    return with_headers
