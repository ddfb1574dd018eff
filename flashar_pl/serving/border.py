"""Who may ask the server: clients that know it by one of its names, with requests of one meaning."""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

ONCE = ("host", "origin", "content-type", "content-length", "transfer-encoding")


class Border:
    """ASGI middleware. hosts: the server's names, "*" for any; pages of other names are refused, rebound ones too."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self.app, self.hosts = app, {host.strip(" []").lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on. HTTPException: it is refused. A page can send JSON only with the server's leave."""
        headers = Headers(scope=scope)
        if any(len(headers.getlist(name)) > 1 for name in ONCE) or {*ONCE[-2:]} <= {*headers}:
            raise HTTPException(400, f"expected each of {', '.join(ONCE)} at most once, and one of the last two.")
        for name, status in (("host", 400), ("origin", 403)):
            host = re.sub(r"^\w+://|:\d*$", "", headers.get(name, "")).strip("[]").lower()
            if "*" not in self.hosts and name in {"host", *headers} and host not in self.hosts:
                raise HTTPException(status, f"{name} is {headers.get(name, '')[:80]!r}; name it in --allowed-hosts.")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope.get("method") == "POST" and kind != "application/json":
            raise HTTPException(415, f"content-type is {kind[:80]!r}; expected application/json.")
        await self.app(scope, receive, send)
