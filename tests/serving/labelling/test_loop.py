"""The whole loop: SFT, labels, reward model, PPO, and labels again on fresh samples, the least certain first."""

from __future__ import annotations

from pathlib import Path

from dovetail.data.labels.database import Store, open_store
from dovetail.data.labels.labels import Submission, submit
from dovetail.data.labels.queue import next_task
from dovetail.data.labels.schema import Task
from dovetail.data.labels.tasks import open_project
from dovetail.engine.sampling import Sampling
from dovetail.rlhf.rewards import Scorer
from dovetail.runs.run_models import model_folder, reward_folder
from dovetail.serving.labelling.answerer import load_answerer, reward_scorer
from dovetail.serving.labelling.supply import Plan, Supply
from dovetail.stages.pipeline import run
from dovetail.text.message import message
from tests.serving.labelling.work import annotator
from tests.stages.runs import tiny_run

PROMPTS = [(message("user", f"Say {number}."),) for number in range(24)]
SAMPLING = Sampling(max_new_tokens=8)


def sample(store: Store, project: int, path: str, scorer: Scorer | None = None) -> dict[str, list[str]]:
    """Tasks of all prompts, as `dovetail label` makes them; the question of each, and its answers."""
    plan = Plan(sampling=SAMPLING, ahead=1000)
    Supply(store, project, PROMPTS, [load_answerer(path, device="cpu")], plan, scorer).work()
    with store.reading() as session:
        tasks = session.query(Task).where(Task.project_id == project)
        return {task.messages[0]["content"]: [answer.text for answer in task.answers] for task in tasks}


def label_all(store: Store, project: int, person: int) -> list[str]:
    """Prefer whichever answer has more letters; the questions in the order they were offered."""
    questions = []
    while (assigned := next_task(store, project, person)) is not None:
        questions.append(assigned.messages[0]["content"])
        letters = [sum(map(str.isalpha, answer)) for answer in assigned.answers]
        said = Submission(
            assignment_id=assigned.id, verdict="answer", chosen=letters.index(max(letters)), seconds=1
        )
        submit(store, project, person, said)
    return questions


def test_labels_make_a_reward_model_that_makes_a_policy_whose_samples_are_labelled_again(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    store = open_store(url)
    ann = annotator(store, "ann")
    first = tiny_run(tmp_path, stages=["sft"])
    run(first)
    before = sample(store, open_project(store, "round-1"), model_folder(first.output_dir))
    assert sorted(label_all(store, 1, ann)) == sorted(before)

    rows = [
        {"path": f"labels:{url}", "name": "round-1", "stages": ["reward"]},
        *(source for source in first.model_dump()["data"]["blend"] if "ppo" in source["stages"]),
    ]
    sft = {"path": model_folder(first.output_dir)}
    second = tiny_run(
        tmp_path, stages=["reward", "ppo"], actor=sft, reward_model=sft, data={"blend": rows},
        output_dir=str(tmp_path / "round-1"),
    )  # fmt: skip
    run(second)
    assert model_folder(second.output_dir) == str(tmp_path / "round-1/ppo/model")

    project = open_project(store, "round-2")
    scorer = reward_scorer(reward_folder(second.output_dir), device="cpu")
    after = sample(store, project, model_folder(second.output_dir), scorer)
    shared = before.keys() & after.keys()
    assert any(before[question] != after[question] for question in shared)  # the same prompts, drawn anew
    with store.reading() as session:
        margins = {
            task.messages[0]["content"]: task.margin
            for task in session.query(Task)
            if task.margin is not None
        }
    offered = [margins[question] for question in label_all(store, project, ann)]
    assert len(offered) == len(after) >= 8
    assert offered == sorted(offered)
    store.close()
