from fractions import Fraction

from dovetail.data.labels.database import Store
from dovetail.data.labels.labels import Submission, submit, void
from dovetail.data.labels.queue import next_task
from dovetail.data.labels.statistics import progress, statistics
from tests.serving.labelling.work import annotator, new_project, task

SAID = {
    "ann": ["good", "good", "good", "bad", "tie", "tie"],
    "ben": ["good", "good", "bad", "bad", "tie", "both_bad"],
    "cem": ["good", "bad"],
}


def test_agreement_is_of_answers_and_not_of_places(store: Store) -> None:
    project = new_project(store, *map(task, range(6)), overlap=3)
    people = {name: annotator(store, name) for name in SAID}
    boss = annotator(store, "boss", is_admin=True)
    for name, verdicts in SAID.items():
        for number, verdict in enumerate(verdicts):
            assigned = next_task(store, project, people[name])
            assert assigned is not None
            answer = f"{verdict} {number}"
            chosen = assigned.answers.index(answer) if answer in assigned.answers else None
            kind = "answer" if chosen is not None else verdict
            said = Submission(assignment_id=assigned.id, verdict=kind, chosen=chosen, seconds=number + 1)  # type: ignore[arg-type]
            label = submit(store, project, people[name], said)
    figures = statistics(store, project, people["ann"])
    pairs = {(pair.first, pair.second): (pair.tasks, pair.agreement, pair.kappa) for pair in figures.pairs}
    # ann: 3 good, 1 bad, 2 tie; ben: 2 good, 2 bad, 1 tie, 1 both bad; 4 of 6 the same.
    chance = Fraction(3 * 2 + 1 * 2 + 2 * 1, 36)
    assert pairs["ann", "ben"] == (6, 4 / 6, float((Fraction(4, 6) - chance) / (1 - chance)))
    # ann: good, good; cem: good, bad: 1 of 2 the same, and by chance 1/2.
    assert pairs["ann", "cem"] == pairs["ben", "cem"] == (2, 0.5, 0.0)
    # The six tasks: ggg, ggb, gb, bb, tt, t+both. Shares of agreeing pairs 1, 1/3, 0, 1, 1, 0.
    observed = Fraction(1, 6) * (3 + Fraction(1, 3))
    chance = Fraction(6**2 + 4**2 + 3**2 + 1**2, 14**2)
    assert figures.fleiss == float((observed - chance) / (1 - chance))
    assert figures.shared_tasks == 6
    assert figures.verdicts == {"answer": 10, "tie": 3, "both_bad": 1}
    speeds = {one.name: (one.labels, one.median_seconds) for one in figures.speeds}
    assert speeds == {"ann": (6, 3.5), "ben": (6, 3.5), "cem": (2, 1.5), "boss": (0, None)}
    assert (figures.progress.own_labels, figures.progress.labels, figures.progress.wanted) == (6, 14, 18)
    void(store, project, boss, label, "mistaken")
    assert progress(store, project, people["cem"]).own_labels == 1
    assert {p.tasks for p in statistics(store, project, boss).pairs if p.second == "cem"} == {1}


def test_without_labels_nothing_is_claimed(store: Store) -> None:
    project = new_project(store)
    figures = statistics(store, project, annotator(store, "ann"))
    assert (figures.fleiss, figures.pairs, figures.shared_tasks, figures.verdicts) == (None, (), 0, {})
    assert figures.progress.wanted == 0
