"""Keep the logins of browsers.

Responsible for: beginning and ending a login, and finding its annotator. Not responsible for: invitations
(annotators.py), cookies (serving/labelling/access.py).

A login has a secret of its own, so it can end while its invitation stays valid.
"""

from __future__ import annotations

import secrets

from sqlalchemy import delete

from dovetail.data.labels.annotators import Person, digest_of, person_of, person_with
from dovetail.data.labels.database import Store
from dovetail.data.labels.schema import Login

LOGIN_SECONDS = 30 * 24 * 3600
"""The time for which a browser stays logged in."""


def begin_login(store: Store, token: str) -> str | None:
    """Log in with an invitation, and return the secret for the browser, or None for an unknown or expired token."""
    person = person_of(store, token)
    if person is None:
        return None
    secret, now = secrets.token_urlsafe(32), store.clock()
    with store.writing() as session:
        session.execute(delete(Login).where(Login.expires_at <= now))
        session.add(Login(digest=digest_of(secret), annotator_id=person.id, expires_at=now + LOGIN_SECONDS))
    return secret


def end_login(store: Store, secret: str) -> None:
    """End the login that has this secret."""
    with store.writing() as session:
        session.execute(delete(Login).where(Login.digest == digest_of(secret)))


def person_logged_in(store: Store, secret: str) -> Person | None:
    """Return the annotator of the login that has this secret, or None if there is none."""
    return person_with(store, Login, secret)
