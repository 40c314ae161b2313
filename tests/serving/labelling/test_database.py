import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from dovetail.data.labels.annotators import invite, person_of
from dovetail.data.labels.database import Store, open_store, shown
from dovetail.data.labels.schema import Annotator, Label, Project, Table, Task
from dovetail.data.labels.tasks import open_project
from dovetail.errors import LabelError
from tests.serving.labelling.work import new_project, task

OPENING = """
import sys
from dovetail.data.labels.database import open_store
from dovetail.data.labels.tasks import open_project
sys.stdin.readline()
print(open_project(open_store(sys.argv[1]), "shared"))
"""


def test_migrations_make_the_tables_that_the_code_has(store: Store) -> None:
    with store.engine.connect() as connection:
        assert set(inspect(connection).get_table_names()) == {*Table.metadata.tables, "alembic_version"}
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []


def test_opening_again_changes_nothing(url: str) -> None:
    first = open_store(url)
    project = new_project(first, task(1))
    first.close()
    again = open_store(url, must_exist=True)
    assert open_project(again, "test") == project
    again.close()


def test_many_processes_may_start_at_once(url: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPENING, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[0].strip() for process in processes] == ["1"] * 4


def wait_until_it_waits(store: Store, second: Future[object]) -> None:
    """Until a transaction waits for another, or `second` is done with its own; SQLite does not tell."""
    waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    while store.engine.dialect.name == "postgresql" and not second.done():
        with store.reading() as session:
            if session.execute(waiting).scalar():
                return
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("row", "make_the_same"),
    [
        (
            lambda: Project(name="new", overlap=1, guidelines="", created_at=0.0),
            lambda store: open_project(store, "new"),
        ),
        (
            lambda: Annotator(name="admin", is_admin=True, created_at=0.0),
            lambda store: invite(store, "admin", is_admin=True),
        ),
    ],
    ids=["project", "annotator"],
)
def test_what_another_is_about_to_make_is_found_and_not_made_twice(
    store: Store, row: Callable[[], Table], make_the_same: Callable[[Store], object]
) -> None:
    made = row()
    with ThreadPoolExecutor(1) as pool:
        with store.writing() as session:
            session.add(made)
            session.flush()
            second = pool.submit(make_the_same, store)
            wait_until_it_waits(store, second)
        second.result()
    with store.reading() as session:
        assert session.query(type(made)).count() == 1


def test_a_transaction_is_kept_whole_or_not_at_all(store: Store) -> None:
    project = new_project(store)

    def add_and_fail() -> None:
        with store.writing(project) as session:
            session.add(Task(project_id=project, key="k", prompt_key="p", messages=[], created_at=0.0))
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        add_and_fail()
    with store.reading() as session:
        assert session.query(Task).count() == 0


@pytest.mark.parametrize(
    "changes",
    [{"assignment_id": 99}, {"seconds": -1.0}, {"verdict": "maybe"}, {"chosen": 1}, {"verdict": "answer"}],
    ids=str,
)
def test_the_database_itself_refuses_what_cannot_be(store: Store, changes: dict[str, object]) -> None:
    values = {
        "verdict": "tie",
        "ratings": [],
        "seconds": 1.0,
        "shown_order": [],
        "created_at": 0.0,
        **changes,
    }
    if "assignment_id" not in changes:
        with store.engine.begin() as connection:  # the row that a label needs
            connection.execute(text("INSERT INTO projects VALUES (1, 'p', 1, '', 0)"))
            connection.execute(text("INSERT INTO tasks VALUES (1, 1, 'k', 'k', '[]', NULL, 0)"))
            connection.execute(text("INSERT INTO annotators VALUES (1, 'a', false, 0)"))
            connection.execute(text("INSERT INTO assignments VALUES (1, 1, 1, '[]', 'open', 0, 0)"))
        values["assignment_id"] = 1
    with pytest.raises(IntegrityError), store.writing() as session:
        session.add(Label(**values))


def test_sqlite_syncs_each_commit_and_lets_readers_read(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'labels.db'}")
    with store.engine.connect() as connection:
        found = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                 for name in ("journal_mode", "synchronous", "foreign_keys")}  # fmt: skip
        assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    with store.writing() as writer, store.reading() as reader:
        writer.execute(text("INSERT INTO projects VALUES (1, 'p', 1, '', 0)"))
        assert reader.execute(text("SELECT count(*) FROM projects")).scalar() == 0
    store.close()


@pytest.mark.parametrize(
    ("url", "problem", "hint"),
    [
        ("labels.db", "not the URL of a database", "sqlite:///labels.db"),
        (
            "mysql://me:secret@host/db",
            r"mysql://me:\*\*\*@host/db: labels are not kept in mysql",
            "postgresql",
        ),
        ("sqlite://", "would be lost", "sqlite:///labels.db"),
        ("sqlite:////no/such/folder/labels.db", "there is no folder", "make it first"),
        ("postgresql://me:secret@127.0.0.1:1/db", "cannot be used: .*127.0.0.1", "pgpass"),
    ],
)
def test_bad_urls_are_explained_without_their_password(url: str, problem: str, hint: str) -> None:
    with pytest.raises(LabelError, match=problem) as raised:
        open_store(url)
    assert hint in str(raised.value.hint)
    assert "secret" not in str(raised.value)


def test_files_that_are_no_database_are_explained(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="there is no file"):
        open_store(f"sqlite:///{tmp_path / 'labels.db'}", must_exist=True)
    (tmp_path / "labels.db").write_text("not a database, but long enough to be taken for one" * 100)
    with pytest.raises(LabelError, match="file is not a database"):
        open_store(f"sqlite:///{tmp_path / 'labels.db'}")


def test_a_newer_database_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "labels.db"
    open_store(f"sqlite:///{file}").close()
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(LabelError, match="version 9999, which this program does not know"):
        open_store(f"sqlite:///{file}")


def test_urls_are_shown_without_password() -> None:
    assert shown("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert shown("no url") == "no url"


def test_people_are_known_by_any_of_their_tokens(store: Store) -> None:
    first, second, other = invite(store, "ann"), invite(store, " ann "), invite(store, "ben", is_admin=True)
    people = [person_of(store, token) for token in (first, second, other)]
    assert [(p.name, p.is_admin) for p in people if p] == [("ann", False), ("ann", False), ("ben", True)]
    assert people[0] == people[1]
    assert person_of(store, first[:-1]) is None
    with pytest.raises(LabelError, match="ann is there already, as no admin"):
        invite(store, "ann", is_admin=True)
    for name in ("", " ", "x" * 101, "a\0b"):
        with pytest.raises(LabelError, match="name"):
            invite(store, name)


def test_projects_keep_what_is_not_given(store: Store) -> None:
    project = open_project(store, "p", overlap=3, guidelines="Be kind.")
    assert open_project(store, "p") == project
    with store.reading() as session:
        assert session.execute(text("SELECT overlap, guidelines FROM projects")).one() == (3, "Be kind.")
    assert open_project(store, "p", overlap=2, guidelines="Be brief.") == project
    with store.reading() as session:
        assert session.execute(text("SELECT overlap, guidelines FROM projects")).one() == (2, "Be brief.")
    for name, overlap, problem in (
        ("", 1, "not a valid project name"),
        ("p", 0, "overlap = 0"),
        ("p", -1, "overlap = -1"),
    ):
        with pytest.raises(LabelError, match=problem):
            open_project(store, name, overlap=overlap)
