"""Check every request before a route reads it.

Responsible for: draining, API key, rate and body size, in this order, and counting requests and responses.
Not responsible for: the content of a request (routes.py).

The gate is plain ASGI: it passes streams through unchanged, and a route that waits for a disconnect sees it.
Only the paths of the API and its metrics need a key; pages of other parts of the server have logins of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dovetail.serving.keys import ApiKeys
from dovetail.serving.meters import Meters
from dovetail.serving.problems import Problem

_GUARDED = ("/v1/", "/metrics")
_MANY_CALLERS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """The limits of one request, and the rate of one caller."""

    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    """The most tokens of a prompt; None: as many as the model's context holds."""
    max_new_tokens: int | None = None
    """The most tokens of one answer; None: as many as the context has left."""
    max_choices: int = 16
    """The most answers that one request may ask for, over all its prompts."""
    requests_per_minute: float | None = None
    """The rate of one key, or of one address if the server needs no keys. Wrong keys and logins count for their
    address.
    """


class Rate:
    """A token bucket for each caller. It holds the requests of one minute, and refills steadily."""

    def __init__(self, per_minute: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = max(1.0, per_minute)
        self._per_second = per_minute / 60
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """Caller -> (requests left, at this time)."""

    def wait(self, caller: str) -> float:
        """Return the seconds until this caller may send a request; 0 means now, and counts the request."""
        now = self._clock()
        if len(self._buckets) >= _MANY_CALLERS:
            self._forget_the_idle(now)
        left = self._left(caller, now)
        if left < 1:
            return (1 - left) / self._per_second
        self._buckets[caller] = (left - 1, now)
        return 0.0

    def _left(self, caller: str, now: float) -> float:
        left, then = self._buckets.get(caller, (self._most, now))
        return min(self._most, left + (now - then) * self._per_second)

    def _forget_the_idle(self, now: float) -> None:
        self._buckets = {
            caller: bucket for caller, bucket in self._buckets.items() if self._left(caller, now) < self._most
        }


class Gate:
    """The middleware that admits or refuses each request."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: RequestLimits,
        keys: ApiKeys | None,
        meters: Meters,
        drain: Drain,
        logins: Collection[str] = (),
    ) -> None:
        """Wrap `app`. logins: paths outside the API that take login requests."""
        self._app = app
        self._logins = logins
        self._limits = limits
        self._keys = keys
        self._rate = Rate(limits.requests_per_minute) if limits.requests_per_minute else None
        self._meters = meters
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, statuses = time.perf_counter(), [500]

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses[0] = message["status"]
            await send(message)

        try:
            body = await self._admit(scope, receive)
            with self._drain.holding():  # not before: a request that is never complete must not delay the end
                await self._app(scope, _replay(body, receive) if body is not None else receive, noting)
        except Problem as problem:  # raised by the gate; the application answers its own
            await problem.response()(scope, receive, noting)
        finally:
            self._meters.request_done(scope, statuses[0], time.perf_counter() - began)

    async def _admit(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body, or None for methods without one. Raises Problem for a request that may not pass."""
        headers = Headers(scope=scope)
        has_body = scope["method"] in ("POST", "PUT", "PATCH", "DELETE")
        if has_body and self._drain.has_begun:
            raise Problem(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})
        if scope["path"].startswith(_GUARDED):
            caller = self._caller(scope, headers)
            if has_body:
                self._count(caller)
        elif has_body and scope["path"] in self._logins:
            self._count(_address(scope))
        return await self._body(headers, receive) if has_body else None

    def _count(self, caller: str) -> None:
        """Count a request of this caller. Raises Problem if the caller has sent too many."""
        if self._rate is not None and (seconds := self._rate.wait(caller)):
            raise Problem(
                429,
                f"more than {self._limits.requests_per_minute:g} requests a minute; "
                f"try again in {seconds:.1f} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(int(seconds) + 1)},
            )

    def _caller(self, scope: Scope, headers: Headers) -> str:
        """Return the caller, a key's owner or an address. Raises Problem for a wrong or missing key."""
        if self._keys is None:
            return _address(scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Problem(
                401,
                "no API key: send the header `Authorization: Bearer KEY`",
                code="missing_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        owner = self._keys.owner(key.strip())
        if owner is None:
            self._count(_address(scope))
            raise Problem(
                401,
                "this API key is not known",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return f"key {owner}"

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        most = self._limits.max_body_bytes
        too_large = Problem(413, f"the body is larger than {most} bytes", code="body_too_large")
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Problem(499, "the client left before the body was complete")
            body += message.get("body", b"")
            if len(body) > most:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)


class Drain:
    """The state of a server that may be stopping, with the number of its open requests."""

    def __init__(self) -> None:
        self.has_begun = False
        self.num_open = 0

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Keep the server running until the block ends."""
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return f"address {client[0]}" if client else "unknown"


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first returns the whole body, and then passes on later messages."""
    is_given = False

    async def again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
