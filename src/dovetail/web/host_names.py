"""Which names a server answers to, so that no page of another site can reach it by giving itself a new address.

Responsible for: refusing requests whose Host header is somebody else's name (DNS rebinding).
Not responsible for: who may ask what (keys, invitations).

A rebinding site reaches a server of this machine or its network through a name of the site's own, so the name is what
gives it away: a number, `localhost`, this machine's own names and those that were named at the start can be nobody
else's.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class HostNames:
    """The outermost layer of an application: 421 for requests to a name that is not this server's."""

    def __init__(self, app: ASGIApp, *, names: Sequence[str] = ()) -> None:
        """names: those beside numbers, localhost and the machine's own."""
        self._app = app
        self._names = {name.casefold() for name in ("localhost", *_own_names(), *names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            name = _name_in(Headers(scope=scope).get("host", ""))
            if name not in self._names and not _is_number(name):
                await _refusal(name)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _own_names() -> tuple[str, ...]:
    name = socket.gethostname()
    return (name, f"{name}.local")


def _name_in(host: str) -> str:
    """The header without its port, and without the brackets of an IPv6 address."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].casefold().removesuffix(".")


def _is_number(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _refusal(name: str) -> JSONResponse:
    detail = {
        "message": f"this server is not called {name!r}",
        "hint": f"whoever runs it can let it answer to this name: --allow-host {name or 'NAME'}",
        "type": "invalid_request_error",
        "param": None,
        "code": "unknown_host",
    }
    return JSONResponse({"error": detail}, status_code=421)
