from pathlib import Path

import pytest
from sqlalchemy import event, select

from dovetail.data.labels.database import ConflictError, NotFoundError, Store, open_store
from dovetail.data.labels.labels import Submission, list_labels, submit, undo, void
from dovetail.data.labels.queue import Assigned, next_task, skip
from dovetail.data.labels.schema import Assignment, Label, Void
from dovetail.data.labels.tasks import add_tasks, num_ready
from dovetail.errors import LabelError
from tests.serving.labelling.work import Clock, annotator, new_project, task


def choose(store: Store, project: int, person: int, assigned: Assigned, text: str) -> int:
    shown = assigned.answers.index(text)
    return submit(
        store,
        project,
        person,
        Submission(assignment_id=assigned.id, verdict="answer", chosen=shown, seconds=1),
    )


def served(store: Store, project: int, person: int) -> Assigned:
    found = next_task(store, project, person)
    assert found is not None
    return found


def test_the_open_task_is_served_again_and_a_labelled_one_never(store: Store) -> None:
    project = new_project(store, task(1), task(2), overlap=2)
    ann = annotator(store, "ann")
    first = served(store, project, ann)
    assert served(store, project, ann).id == first.id
    choose(store, project, ann, first, "good 1")
    second = served(store, project, ann)
    assert second.messages[0]["content"] == "Question 2?"
    choose(store, project, ann, second, "bad 2")
    assert next_task(store, project, ann) is None
    assert num_ready(store, project) == 0  # each lacks a second annotator, but ann has had them all


def test_a_lease_keeps_others_away_until_it_ends(url: str) -> None:
    clock = Clock()
    store = open_store(url, clock=clock)
    project = new_project(store, task(1))
    ann, ben = annotator(store, "ann"), annotator(store, "ben")
    lost = next_task(store, project, ann, lease_seconds=60)
    assert lost is not None
    clock.now += 60 - 1e-3
    assert next_task(store, project, ben) is None
    clock.now += 1
    assert served(store, project, ben).messages == lost.messages
    with pytest.raises(ConflictError, match="ran out"):
        choose(store, project, ann, lost, "good 1")
    assert next_task(store, project, ann) is None
    assert list_labels(store, project) == []
    store.close()


def test_a_late_label_counts_while_its_place_is_free(url: str) -> None:
    clock = Clock()
    store = open_store(url, clock=clock)
    project = new_project(store, task(1))
    ann = annotator(store, "ann")
    assigned = served(store, project, ann)
    clock.now += 1e6
    assert choose(store, project, ann, assigned, "good 1")
    store.close()


def test_skipping_frees_the_place_for_others_only(store: Store) -> None:
    project = new_project(store, task(1))
    ann, ben = annotator(store, "ann"), annotator(store, "ben")
    assigned = served(store, project, ann)
    skip(store, project, ann, assigned.id)
    assert next_task(store, project, ann) is None
    with pytest.raises(ConflictError, match="already skipped"):
        choose(store, project, ann, assigned, "good 1")
    assert served(store, project, ben).messages == assigned.messages


def test_undo_opens_the_task_again_and_keeps_the_label(store: Store) -> None:
    project = new_project(store, task(1), task(2))
    ann, ben = annotator(store, "ann"), annotator(store, "ben")
    first = served(store, project, ann)
    choose(store, project, ann, first, "bad 1")
    second = served(store, project, ann)
    again = undo(store, project, ann)
    assert (again.id, again.answers) == (first.id, first.answers)
    assert next_task(store, project, ben) is None  # both places are taken
    choose(store, project, ann, again, "good 1")
    assert served(store, project, ann).id == second.id
    lines = list_labels(store, project)
    assert [(line.chosen, line.void) for line in lines] == [("good 1", None), ("bad 1", "undone")]
    with pytest.raises(ConflictError, match="no label of yours"):
        undo(store, project, ben)


def test_a_voided_label_frees_its_place_for_others_only(store: Store) -> None:
    project = new_project(store, task(1))
    ann, ben, boss = annotator(store, "ann"), annotator(store, "ben"), annotator(store, "boss", is_admin=True)
    label = choose(store, project, ann, served(store, project, ann), "bad 1")
    assert next_task(store, project, ben) is None
    void(store, project, boss, label, "mistaken")
    assert next_task(store, project, ann) is None
    choose(store, project, ben, served(store, project, ben), "good 1")
    lines = list_labels(store, project)
    assert [(line.annotator, line.void) for line in lines] == [("ben", None), ("ann", "mistaken")]
    with pytest.raises(ConflictError, match="counts no more: mistaken"):
        void(store, project, boss, label, "again")
    with pytest.raises(NotFoundError, match="no label 999"):
        void(store, project, boss, 999, "why not")
    with pytest.raises(LabelError, match="for a reason"):
        void(store, project, boss, label, " ")
    with pytest.raises(ConflictError, match="no label of yours"):
        undo(store, project, ann)


def test_others_tasks_are_as_if_they_were_not_there(store: Store) -> None:
    project = new_project(store, task(1), overlap=2)
    other = new_project(store, task(1), name="other")
    ann, ben = annotator(store, "ann"), annotator(store, "ben")
    assigned = served(store, project, ann)
    for where, who in ((project, ben), (other, ann)):
        with pytest.raises(NotFoundError, match="you have no task"):
            choose(store, where, who, assigned, "good 1")
        with pytest.raises(NotFoundError, match="you have no task"):
            skip(store, where, who, assigned.id)


def test_uncertain_tasks_come_first_and_unscored_last(store: Store) -> None:
    project = new_project(
        store,
        task(1),
        task(2, scores=(0.0, 3.0)),
        task(3, scores=(1.0, 0.5)),
        task(4, "a", "b", "c", scores=(9.0, 0.0, 8.9)),
    )
    ann = annotator(store, "ann")
    order = []
    while (assigned := next_task(store, project, ann)) is not None:
        order.append(assigned.messages[0]["content"])
        skip(store, project, ann, assigned.id)
    assert order == ["Question 4?", "Question 3?", "Question 2?", "Question 1?"]


def test_the_order_of_answers_differs_between_annotators_and_tasks(store: Store) -> None:
    project = new_project(store, *map(task, range(20)), overlap=2)
    firsts = {}
    for name in ("ann", "ben"):
        person = annotator(store, name)
        firsts[name] = []
        while (assigned := next_task(store, project, person)) is not None:
            firsts[name].append(assigned.answers[0].split()[0])
            choose(store, project, person, assigned, assigned.answers[0])
    assert firsts["ann"] != firsts["ben"]
    assert all(4 <= seen.count("good") <= 16 for seen in firsts.values())  # 1 in 400 sides would not be


def test_tasks_without_two_different_answers_are_not_offered(store: Store) -> None:
    project = new_project(store, task(1))
    assert (
        add_tasks(store, project, [task(1), task(2, "same", "same"), task(3, "one"), task(4, "nul \0", "b")])
        == 0
    )
    assert num_ready(store, project) == 1


def test_labels_are_only_ever_added(store: Store) -> None:
    statements: list[str] = []
    project = new_project(store, task(1), overlap=2)
    ann, ben, boss = (annotator(store, name) for name in ("ann", "ben", "boss"))

    def listen(_c: object, _k: object, statement: str, *_rest: object) -> None:
        statements.append(statement.upper())

    event.listen(store.engine, "before_cursor_execute", listen)
    choose(store, project, ann, served(store, project, ann), "bad 1")
    choose(store, project, ann, undo(store, project, ann), "good 1")
    label = choose(store, project, ben, served(store, project, ben), "bad 1")
    void(store, project, boss, label, "mistaken")
    event.remove(store.engine, "before_cursor_execute", listen)
    writes = {" ".join(s.split()[:3]) for s in statements if s.startswith(("INSERT", "UPDATE", "DELETE"))}
    assert writes == {
        "INSERT INTO ASSIGNMENTS", "INSERT INTO LABELS", "INSERT INTO VOIDS", "UPDATE ASSIGNMENTS SET"
    }  # fmt: skip
    with store.reading() as session:
        assert len(session.scalars(select(Label)).all()) == 3
        assert len(session.scalars(select(Void)).all()) == 2
        assert {one.state for one in session.scalars(select(Assignment))} == {"labelled", "voided"}


BAD = {
    "chosen_without": Submission(assignment_id=1, verdict="answer"),
    "chosen_with_tie": Submission(assignment_id=1, verdict="tie", chosen=0),
    "no_such_answer": Submission(assignment_id=1, verdict="answer", chosen=2),
    "negative_answer": Submission(assignment_id=1, verdict="answer", chosen=-1),
    "one_rating": Submission(assignment_id=1, verdict="tie", ratings=[1]),
    "rating_of_six": Submission(assignment_id=1, verdict="tie", ratings=[1, 6]),
    "negative_seconds": Submission(assignment_id=1, verdict="tie", seconds=-1.0),
    "endless": Submission(assignment_id=1, verdict="tie", seconds=float("inf")),
    "no_number": Submission(assignment_id=1, verdict="tie", seconds=float("nan")),
    "edited_to_nothing": Submission(assignment_id=1, verdict="tie", edited="  "),
    "edited_to_the_same": Submission(assignment_id=1, verdict="tie", edited="good 1"),
    "half_a_character": Submission(assignment_id=1, verdict="tie", note="\ud800"),
    "nul": Submission(assignment_id=1, verdict="tie", note="a\0b"),
    "unknown_verdict": Submission(assignment_id=1, verdict="perhaps"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("said", BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_refused_and_changes_nothing(tmp_path: Path, said: Submission) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'labels.db'}")
    project = new_project(store, task(1))
    ann = annotator(store, "ann")
    assigned = served(store, project, ann)
    assert assigned.id == 1
    with pytest.raises(LabelError) as raised:
        submit(store, project, ann, said)
    assert raised.value.hint
    assert list_labels(store, project) == []
    assert served(store, project, ann).id == 1
    store.close()
