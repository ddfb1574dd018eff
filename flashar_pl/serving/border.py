"""Who may ask the server: clients that know it by one of its names, with requests of one meaning."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

ONCE = ("host", "origin", "content-type", "content-length", "transfer-encoding")


class Border:
    """ASGI middleware. hosts: the server's names, "*" for any; pages of other names are refused, rebound ones too."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self.app, self.hosts = app, {host.strip(" []").lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        told = self.objection(Headers(scope=scope), scope["method"]) if scope["type"] == "http" else None
        error = {"error": {"message": told and told[1], "type": "invalid_request_error"}}
        await (JSONResponse(error, told[0]) if told else self.app)(scope, receive, send)

    def objection(self, headers: Headers, method: str) -> tuple[int, str] | None:
        """Status and message for a request that is refused. A page can send JSON only with the server's leave."""
        if any(len(headers.getlist(name)) > 1 for name in ONCE) or {*ONCE[-2:]} <= {*headers}:
            return 400, f"a request holds each of {', '.join(ONCE)} at most once, and one of the last two."
        for name, where in (("host", "//" + headers.get("host", "")), ("origin", headers.get("origin"))):
            if where is not None and "*" not in self.hosts and self._name(where) not in self.hosts:
                return 403 if name == "origin" else 400, f"{name} is {where[:80]!r}; name it in --allowed-hosts."
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            return 415, f"content-type is {kind[:80]!r}; expected application/json."
        return None

    @staticmethod
    def _name(where: str) -> str | None:
        try:
            return urlsplit(where).hostname
        except ValueError:
            return None
