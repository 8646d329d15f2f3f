"""Who may ask: requests for another host or from a page of another origin are refused; answers get strict headers.

A web page anywhere can send requests to this machine from the browser of whoever looks at it, also under a name of its
own that it lets point to this machine (DNS rebinding). The first shows in the header Origin or Sec-Fetch-Site, the
second in Host.
"""

import base64
import hashlib
import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_AUTHORITY = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Guard:
    """Stands before an application.

    Args:
        app: the application.
        hosts: names under which the server may be asked for, besides localhost and numeric addresses: no name can be
            made to point to those.
        page: the HTML page whose own script and style may run; nothing else may.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], page: str) -> None:
        self.app = app
        self.hosts = frozenset({"localhost", *(host.lower() for host in hosts)})
        self.headers = {**_HEADERS, "Content-Security-Policy": content_policy(page)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or hand it on; see ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self.app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self.is_ours(host):
            return _refused(421, "this server is not asked for under that host name; --allow-host NAME lets it be")
        origins = headers.getlist("origin")
        is_visit = scope["path"] == "/" and scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        is_foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not is_visit
        if is_foreign or any(not _is_same(origin, host) for origin in origins):
            return _refused(403, "pages of other origins may not send requests here")
        return None

    def is_ours(self, authority: str) -> bool:
        """Whether a Host header names this server: a name that it knows, or a numeric address."""
        found = _AUTHORITY.fullmatch(authority)
        if found is None:
            return False
        name = found[1].strip("[]").lower()
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def content_policy(page: str) -> str:
    """A content security policy under which the page's own script and style run, and nothing is fetched elsewhere."""
    script, style = (_hash_of(page, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src 'self' blob: data:; "
        "media-src blob: mediastream:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash_of(page: str, tag: str) -> str:
    content = page.split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _is_same(origin: str, host: str) -> bool:
    scheme, _, authority = origin.lower().partition("://")
    return scheme in ("http", "https") and authority == host.lower()


def _refused(status: int, why: str) -> JSONResponse:
    return JSONResponse({"error": why}, status, {"Connection": "close"})
