"""Refuse requests under names that are not this server's, as a defence against DNS rebinding.

Responsible for: comparing the Host header with the names of this server.
Not responsible for: the rights of clients (keys, invitations).

In DNS rebinding, a web site lets its own name lead to a server on this machine or its network, so that its pages can
reach that server. The site's name in the Host header shows it: an IP address, `localhost`, this machine's own names and
the names given at the start cannot belong to another site.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class HostNames:
    """The outermost layer of an application, which answers 421 to requests under a name that is not this server's."""

    def __init__(self, app: ASGIApp, *, names: Sequence[str] = ()) -> None:
        """Accept IP addresses, localhost, the machine's own names, and `names`."""
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
    """Return the header without its port, and without the brackets of an IPv6 address."""
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
        "hint": f"to allow this name, start the server with --allow-host {name or 'NAME'}",
        "type": "invalid_request_error",
        "param": None,
        "code": "unknown_host",
    }
    return JSONResponse({"error": detail}, status_code=421)
