"""Identify the person behind a request, and check that one of the server's own pages sent it.

Responsible for: the login cookie and the write token. Not responsible for: invitations and logins (data/labels/).

The cookie holds the secret of a login; scripts cannot read it, and other sites cannot make a browser send it
(SameSite=Strict). Its name has the server's port, because browsers keep one set of cookies for all ports of a host.
Requests that change something also need a header with a keyed hash of the secret, which only the server's own page
receives. This protects people whose browser ignores SameSite.
"""

import hashlib
import hmac
from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Header, HTTPException, Request, Response

from dovetail.data.labels.annotators import Person
from dovetail.data.labels.database import Store
from dovetail.data.labels.logins import LOGIN_SECONDS, person_logged_in

_LOG_IN = "log in first, with the link of your invitation"

Guard = Callable[..., Person]


def write_token(secret: str) -> str:
    """Return the token that a request needs besides the cookie if it changes something."""
    return hmac.new(secret.encode(), b"dovetail label", hashlib.sha256).hexdigest()


def cookie_name(request: Request) -> str:
    """Return the name of this server's cookie."""
    return f"dovetail_label_{request.url.port or (443 if request.url.scheme == 'https' else 80)}"


def shown_secret(request: Request) -> str | None:
    """Return the secret of the login in the request's cookie, or None without one."""
    return request.cookies.get(cookie_name(request))


def log_in(request: Request, response: Response, secret: str) -> None:
    """Set the cookie with the secret of the login."""
    response.set_cookie(
        cookie_name(request),
        secret,
        max_age=LOGIN_SECONDS,
        path=request.url.path.rsplit("/api/", 1)[0],
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def log_out(request: Request, response: Response) -> None:
    """Delete the cookie."""
    response.delete_cookie(cookie_name(request), path=request.url.path.rsplit("/api/", 1)[0])


class Access:
    """The guards of routes, as dependencies. Each returns the person, or ends the request."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.reader: Guard = self._reader
        self.writer: Guard = _writer_after(self._reader)
        self.admin: Guard = _admin_after(self._reader)
        self.writing_admin: Guard = _admin_after(self.writer)

    def _reader(self, request: Request) -> Person:
        """Return the person who is logged in. Raises HTTPException 401 if there is none."""
        secret = shown_secret(request)
        person = person_logged_in(self._store, secret) if secret else None
        if person is None:
            raise HTTPException(401, _LOG_IN)
        return person


def _writer_after(reader: Guard) -> Guard:
    def writer(
        request: Request,
        person: Annotated[Person, Depends(reader)],
        x_dovetail_token: Annotated[str, Header(include_in_schema=False)] = "",
    ) -> Person:
        """Return the person. Raises HTTPException 403 unless the request has the write token of the page."""
        expected = write_token(shown_secret(request) or "")
        if not hmac.compare_digest(x_dovetail_token.encode(), expected.encode()):
            raise HTTPException(403, "the header X-Dovetail-Token is missing or wrong: reload the page")
        return person

    return writer


def _admin_after(guard: Guard) -> Guard:
    def admin(person: Annotated[Person, Depends(guard)]) -> Person:
        """Return the person. Raises HTTPException 403 unless the person is an admin."""
        if not person.is_admin:
            raise HTTPException(403, "only an admin may see this: ask for an invitation as one")
        return person

    return admin
