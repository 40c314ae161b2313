"""Eight annotators at once, and servers that die under them."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.exc import InternalError, OperationalError

from dovetail.data.labels.database import Store, open_store
from dovetail.data.labels.labels import Submission, list_labels, submit
from dovetail.data.labels.queue import next_task
from dovetail.data.labels.schema import Assignment
from tests.serving.labelling.postgres import postgres
from tests.serving.labelling.served import Served, a_label, served
from tests.serving.labelling.work import annotator, new_project, task

NAMES = [f"annotator {number}" for number in range(8)]
TASKS, OVERLAP = 24, 3


def places(store: Store) -> list[tuple[int, int]]:
    """(task, annotator) of every assignment there ever was."""
    with store.reading() as session:
        return [(one.task_id, one.annotator_id) for one in session.scalars(select(Assignment))]


def expect_fair(store: Store) -> None:
    """No task beyond its overlap, and none twice to one annotator."""
    found = places(store)
    assert len(found) == len(set(found))
    assert max(Counter(task for task, _ in found).values()) <= OVERLAP


def test_eight_threads_share_the_tasks(store: Store) -> None:
    project = new_project(store, *map(task, range(TASKS)), overlap=OVERLAP)
    people = [annotator(store, name) for name in NAMES]
    together = threading.Barrier(len(people))

    def work(person: int) -> list[str]:
        questions = []
        together.wait()
        while (assigned := next_task(store, project, person)) is not None:
            expect_fair(store)
            questions.append(assigned.messages[0]["content"])
            submit(store, project, person, Submission(assignment_id=assigned.id, verdict="tie", seconds=1))
        return questions

    with ThreadPoolExecutor(len(people)) as pool:
        done = list(pool.map(work, people))
    assert all(len(questions) == len(set(questions)) for questions in done)
    labelled = Counter(question for questions in done for question in questions)
    assert labelled == {f"Question {number}?": OVERLAP for number in range(TASKS)}
    assert len(list_labels(store, project, limit=1000)) == TASKS * OVERLAP


def label_all(server: Served, name: str, acknowledged: list[str], enough: threading.Event) -> None:
    """Label until nothing is left or the server is gone; what it confirmed goes into `acknowledged`."""
    try:
        with server.client(name) as client:
            for number in count():
                task = client.post("next", json={}).raise_for_status().json()["task"]
                if task is None:
                    return
                note = f"{name}, {server.base}, {number}"
                kept = client.post("labels", json=a_label(task, note)).raise_for_status()
                assert kept.status_code == 201
                acknowledged.append(note)
                if len(acknowledged) >= 20:
                    enough.set()
    except httpx.TransportError:
        return  # the server was killed


def test_labels_survive_a_server_that_is_killed_under_load(url: str) -> None:
    store = open_store(url)
    project = new_project(store, *map(task, range(TASKS)), overlap=OVERLAP)
    acknowledged: list[str] = []
    for is_killed in (True, False):
        enough = threading.Event()
        with served(url, NAMES) as server, ThreadPoolExecutor(len(NAMES)) as pool:
            work = [pool.submit(label_all, server, name, acknowledged, enough) for name in NAMES]
            if is_killed:
                assert enough.wait(120)
                server.kill()
            for one in work:
                one.result(timeout=300)
        kept = [line.note for line in list_labels(store, project, limit=1000)]
        assert set(acknowledged) <= set(kept)
        assert len(kept) == len(set(kept))
        assert len(kept) < TASKS * OVERLAP if is_killed else len(kept) == TASKS * OVERLAP
        expect_fair(store)
    # Whatever the dead server did not confirm was served again.
    assert Counter(line.task_id for line in list_labels(store, project, limit=1000)) == {
        number: OVERLAP for number in range(1, TASKS + 1)
    }
    store.close()


@pytest.mark.system
def test_labels_survive_a_postgresql_that_is_killed_under_load() -> None:
    with postgres() as database:
        store = open_store(database.url("postgres"))
        project = new_project(store, *map(task, range(200)), overlap=2)
        people = [annotator(store, name) for name in NAMES]
        acknowledged: list[int] = []
        enough = threading.Event()

        def work(person: int) -> None:
            while (assigned := next_task(store, project, person)) is not None:
                said = Submission(assignment_id=assigned.id, verdict="tie", seconds=1)
                acknowledged.append(submit(store, project, person, said))
                if len(acknowledged) >= 40:
                    enough.set()

        with ThreadPoolExecutor(len(people)) as pool:
            done = [pool.submit(work, person) for person in people]
            assert enough.wait(60)
            database.kill()
            failures = [type(one.exception(timeout=60)) for one in done]
        assert set(failures) <= {OperationalError, InternalError}  # nobody was told that all was done
        store.close()
        database.start()
        again = open_store(database.url("postgres"))
        kept = {line.id for line in list_labels(again, project, limit=1000)}
        assert set(acknowledged) <= kept
        assert len(kept) < 400
        again.close()
