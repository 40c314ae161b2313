"""Who is asking, and whether a page of ours asks for them.

Responsible for: the login cookie and the write token. Not responsible for: invitations (preferences/annotators.py).

The cookie holds the invitation's token; scripts cannot read it, and other sites cannot make a browser send it
(SameSite=Strict). Requests that change something also need a header with a keyed hash of it, which only our
own page is told: a second lock for browsers that leave the first one open.
"""

import hashlib
import hmac
from collections.abc import Callable
from typing import Annotated

from fastapi import Cookie, Depends, Header, HTTPException, Request, Response

from dovetail.preferences.annotators import Person, person_of
from dovetail.preferences.database import Store

COOKIE = "dovetail_label"
_DAYS_30 = 30 * 24 * 3600
_LOG_IN = "log in first, with the link of your invitation"

_HIDDEN_COOKIE = Cookie(include_in_schema=False)  # a login is no parameter

Guard = Callable[..., Person]


def write_token(token: str) -> str:
    """What a request that changes something must show beside the cookie."""
    return hmac.new(token.encode(), b"dovetail label", hashlib.sha256).hexdigest()


def log_in(request: Request, response: Response, token: str) -> None:
    """Let the browser remember the token."""
    response.set_cookie(
        COOKIE,
        token,
        max_age=_DAYS_30,
        path=request.url.path.rsplit("/api/", 1)[0],
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def log_out(request: Request, response: Response) -> None:
    """Let the browser forget it."""
    response.delete_cookie(COOKIE, path=request.url.path.rsplit("/api/", 1)[0])


class Access:
    """The guards of routes, as dependencies: each gives the person, or ends the request."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.reader: Guard = self._reader
        self.writer: Guard = _writer_after(self._reader)
        self.admin: Guard = _admin_after(self._reader)
        self.writing_admin: Guard = _admin_after(self.writer)

    def _reader(self, dovetail_label: Annotated[str | None, _HIDDEN_COOKIE] = None) -> Person:
        """Whoever is logged in; else 401."""
        person = person_of(self._store, dovetail_label) if dovetail_label else None
        if person is None:
            raise HTTPException(401, _LOG_IN)
        return person


def _writer_after(reader: Guard) -> Guard:
    def writer(
        person: Annotated[Person, Depends(reader)],
        dovetail_label: Annotated[str, _HIDDEN_COOKIE],
        x_dovetail_token: Annotated[str, Header(include_in_schema=False)] = "",
    ) -> Person:
        """The same, if the request comes from our page; else 403."""
        expected = write_token(dovetail_label)
        if not hmac.compare_digest(x_dovetail_token.encode(), expected.encode()):
            raise HTTPException(403, "the header X-Dovetail-Token is missing or wrong: reload the page")
        return person

    return writer


def _admin_after(guard: Guard) -> Guard:
    def admin(person: Annotated[Person, Depends(guard)]) -> Person:
        """The same, if it is an admin; else 403."""
        if not person.is_admin:
            raise HTTPException(403, "only an admin may see this: ask for an invitation as one")
        return person

    return admin
