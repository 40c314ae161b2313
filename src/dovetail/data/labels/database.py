"""Open a database of preferences: SQLite by default, PostgreSQL by URL.

Responsible for: URLs, connections, migrations at the start, transactions that many processes can hold at once.
Not responsible for: tables (schema.py) and their use (the other modules here).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, select, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session

from dovetail.data.labels.schema import Project
from dovetail.errors import LabelError

_WAIT_SECONDS = 60
_LOCK = text("SELECT pg_advisory_xact_lock(:key)")
"""The statement that waits for an advisory lock of PostgreSQL and holds it until the transaction ends."""
_MIGRATION_LOCK = 0x646F7665
"""The key of the PostgreSQL advisory lock that one migration at a time holds."""
_WRITING_LOCK = _MIGRATION_LOCK + 1
"""The key of the lock for transactions that write outside of any single project."""


class NotFoundError(LabelError):
    """The error of a request for something that does not exist, or that belongs to another annotator."""


class ConflictError(LabelError):
    """The error of a request that comes too late, such as a second label for the same assignment."""


@dataclass(frozen=True, slots=True)
class Store:
    """An open database at the newest version of its tables. Many threads and processes may use it."""

    engine: Engine
    clock: Callable[[], float] = time.time
    """A function that returns the time in Unix seconds."""

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Open a transaction that changes nothing."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def writing(self, project_id: int | None = None) -> Iterator[Session]:
        """Open a transaction that is committed at the end of the block, or rolled back if the block raises.

        SQLite has one writer at a time. On PostgreSQL the writers of one project wait for each other, so that their
        counts (free places of a task) still hold when they commit. Writers without a project wait for each other too,
        so that a missing row (a project, an annotator) is made once.
        """
        engine = self.engine.execution_options(writes=True)
        with Session(engine, expire_on_commit=False) as session, session.begin():
            if project_id is not None:
                session.execute(select(Project.id).where(Project.id == project_id).with_for_update())
            elif self.engine.dialect.name == "postgresql":
                session.execute(_LOCK, {"key": _WRITING_LOCK})
            yield session

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def open_store(url: str, *, must_exist: bool = False, clock: Callable[[], float] = time.time) -> Store:
    """Connect, and bring the tables to the newest version; safe when many processes start at once.

    must_exist: a missing SQLite file is an error, and is not created.
    Raises LabelError for a bad URL, or a database that cannot be reached or is newer than this package.
    """
    parsed = _checked(url, must_exist=must_exist)
    engine: Engine | None = None
    try:
        engine = _engine(parsed)
        _migrate(engine)
    except (SQLAlchemyError, sqlite3.Error) as error:
        if engine is not None:
            engine.dispose()
        raise LabelError(
            f"{shown(url)}: the database cannot be used: {_cause(error)}",
            hint="check that the file is a SQLite database in a writable folder"
            if parsed.get_backend_name() == "sqlite"
            else "check host, port, user and database; the password may stand in ~/.pgpass",
        ) from error
    return Store(engine, clock)


def shown(url: str) -> str:
    """Return the URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


def _checked(url: str, *, must_exist: bool) -> URL:
    examples = "sqlite:///labels.db, or postgresql://user@host/database"
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise LabelError(f"{url!r} is not the URL of a database", hint=f"such as {examples}") from None
    backend = parsed.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise LabelError(f"{shown(url)}: labels are not kept in {backend}", hint=f"such as {examples}")
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if not parsed.database or parsed.database == ":memory:":
        raise LabelError(f"{url}: labels in memory would be lost", hint="name a file: sqlite:///labels.db")
    file = Path(parsed.database).expanduser()
    if must_exist and not file.is_file():
        raise LabelError(
            f"{url}: there is no file {file}", hint="`dovetail label` makes it; check folder and name"
        )
    if not file.absolute().parent.is_dir():
        raise LabelError(f"{url}: there is no folder {file.parent}", hint="make it first")
    with suppress(OSError):  # if it cannot be made, connecting reports why
        file.touch(mode=0o600)  # only the owner may read labels; SQLite gives its other files the same mode
    return parsed.set(database=str(file))


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "postgresql":
        try:
            return create_engine(url, pool_pre_ping=True)
        except ModuleNotFoundError as error:
            raise LabelError(
                "PostgreSQL needs the package psycopg", hint="pip install 'dovetail-rlhf[postgresql]'"
            ) from error
    # The pool has no limit, so no request waits for it: a connection to a file is cheap, and SQLite queues writers.
    engine = create_engine(url, connect_args={"timeout": _WAIT_SECONDS}, max_overflow=-1)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver begins no transactions of its own: see _begin_sqlite
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later fails if another one wrote in between. One that begins as a
    # writer waits for its turn.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(resources.files("dovetail.data.labels") / "migrations"))
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)
    newest = scripts.get_current_head()
    with engine.connect() as connection:
        if _version(connection) == newest:
            return
    if engine.dialect.name == "sqlite":
        _use_write_ahead_log(engine)
    with engine.execution_options(writes=True).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(_LOCK, {"key": _MIGRATION_LOCK})
        version = _version(connection)
        if version is not None and version not in {script.revision for script in scripts.walk_revisions()}:
            raise LabelError(
                f"the database is of version {version}, which this program does not know",
                hint="it was made by a newer one: pip install -U dovetail-rlhf",
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _version(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _use_write_ahead_log(engine: Engine) -> None:
    """Let readers and the writer run without waiting for each other. The file keeps this mode, so it is set once."""
    connection = engine.raw_connection()
    deadline = time.monotonic() + _WAIT_SECONDS
    try:
        while True:
            try:
                connection.cursor().execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError:  # another process is switching: SQLite does not wait for that
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return
    finally:
        connection.close()


def _cause(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
