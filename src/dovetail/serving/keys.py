"""Create API keys, store them as hashes, and check them in constant time.

Responsible for: the key file and the check. Not responsible for: finding the key in a request (gate.py).

A key is 256 random bits, too many to guess, so one round of SHA-256 protects it. A file has one line for each key,
`NAME sha256:HEX`; text after `#` is a comment.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from dovetail.errors import ConfigError
from dovetail.text_file import read_text

_LINE = re.compile(r"([\w.@-]{1,64}) sha256:([0-9a-f]{64})", re.ASCII)


class ApiKeys:
    """The keys that a server accepts."""

    def __init__(self, hashes: dict[str, str]) -> None:
        """Hold keys by their hashes. hashes: name -> SHA-256 of the key, in hexadecimal."""
        self._hashes = hashes

    def has(self, name: str) -> bool:
        return name in self._hashes

    def owner(self, key: str) -> str | None:
        """Return the name of this key's owner, or None for an unknown key. Both take the same time."""
        given = hash_of(key)
        found = None
        for name, stored in self._hashes.items():
            if hmac.compare_digest(stored, given):
                found = name
        return found


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(file: Path) -> ApiKeys:
    """Read the keys of a file. Raises ConfigError if it is missing, has no keys, or has a line that is not a hash."""
    try:
        lines = read_text(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read: {error}", hint=f"make a key: dovetail api-key {file} NAME"
        ) from error
    hashes: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        found = _LINE.fullmatch(entry)
        if found is None:  # the line itself is not shown: it may be a key
            raise ConfigError(
                f"{file}, line {number}: not of the form `NAME sha256:HEX`",
                hint=f"the file holds hashes, not keys; make a key: dovetail api-key {file} NAME",
            )
        if found[1] in hashes:
            raise ConfigError(
                f"{file}, line {number}: the name {found[1]} occurs twice", hint="give each key its own name"
            )
        hashes[found[1]] = found[2]
    if not hashes:
        raise ConfigError(f"{file} holds no key", hint=f"make one: dovetail api-key {file} NAME")
    return ApiKeys(hashes)


def add_key(file: Path, name: str) -> str:
    """Make a key, append its hash, and return the key, which is stored nowhere. Raises ConfigError if that fails."""
    line = f"{name} sha256:"
    if not _LINE.fullmatch(line + "0" * 64):
        raise ConfigError(
            f"{name!r} cannot be a key's name", hint="use letters, digits and . _ @ - (at most 64)"
        )
    if file.exists() and file.stat().st_size and read_keys(file).has(name):
        raise ConfigError(
            f"{file} has a key named {name} already", hint="remove its line, or take another name"
        )
    key = f"dt-{secrets.token_urlsafe(32)}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes() if file.exists() else b""
        # The last line may lack its line break, for instance after an edit.
        start = "\n" if content and not content.endswith(b"\n") else ""
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as lines:
            lines.write(f"{start}{line}{hash_of(key)}\n")
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be written: {error.strerror}", hint="choose another file"
        ) from error
    return key
