import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from sqlalchemy import select

from dovetail.data.labels.database import Store, open_store
from dovetail.data.labels.labels import Submission, submit
from dovetail.data.labels.queue import next_task, skip
from dovetail.data.labels.schema import Task
from dovetail.data.labels.tasks import num_ready
from dovetail.engine.sampling import Sampling
from dovetail.errors import ConfigError, DataError, GenerationError
from dovetail.model.load import load_scalar_model
from dovetail.model.save import save_model
from dovetail.rlhf.rewards import Answer, Scored
from dovetail.serving.labelling.answerer import load_answerer, reward_scorer
from dovetail.serving.labelling.prompts import read_prompts
from dovetail.serving.labelling.supply import Plan, Supply, answer_seed
from dovetail.text.chat_format import ChatFormat
from dovetail.text.message import Message, message
from dovetail.text.tokenizer import load_tokenizer
from tests.serving.labelling.work import annotator, new_project
from tests.stages.runs import save_tiny_model, write_rows

PROMPTS = [(message("user", f"Say {word}."),) for word in ("tea", "red", "no", "once", "seven")]
PLAN = Plan(sampling=Sampling(max_new_tokens=8), batch_size=2, ahead=3)


class Echo:
    """Answers with its own name and the seed; None to what is too long."""

    def __init__(self, name: str, *, constant: bool = False, fails: bool = False) -> None:
        self.name = name
        self.asked: list[int] = []
        self._constant, self._fails = constant, fails

    def answers(
        self,
        prompts: Sequence[Sequence[Message]],
        seeds: Sequence[int],
        sampling: Sampling,
        is_cancelled: Callable[[], bool],
    ) -> list[Answer | None]:
        self.asked.append(len(prompts))
        if self._fails:
            raise GenerationError("the cache is too small", hint="make it larger")
        return [
            None
            if "long" in prompt[-1]["content"]
            else Answer(
                messages=tuple(prompt),
                text=self.name if self._constant else f"{self.name} {seed}",
                prompt_ids=(1,),
                answer_ids=(2,),
                logprobs=(0.0,),
                finished=True,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]


@pytest.fixture
def project(tmp_path: Path) -> tuple[Store, int]:
    store = open_store(f"sqlite:///{tmp_path / 'labels.db'}")
    return store, new_project(store)


def tasks(store: Store) -> list[Task]:
    with store.reading() as session:
        found = list(session.scalars(select(Task).order_by(Task.id)))
        assert all(task.answers for task in found)
        return found


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_models_answer_in_turn_with_seeds_of_their_own(project: tuple[Store, int]) -> None:
    store, project_id = project
    plan = Plan(
        sampling=Sampling(max_new_tokens=8, top_p=0.5), answers_per_prompt=3, batch_size=2, ahead=100, seed=7
    )
    Supply(store, project_id, PROMPTS, [Echo("a"), Echo("b")], plan).work()
    made = tasks(store)
    assert [task.messages[0]["content"] for task in made] == [prompt[0]["content"] for prompt in PROMPTS]
    for task, prompt in zip(made, PROMPTS, strict=True):
        seeds = [answer_seed(7, prompt, position) for position in range(3)]
        assert [answer.seed for answer in task.answers] == seeds
        assert [answer.text for answer in task.answers] == [f"a {seeds[0]}", f"b {seeds[1]}", f"a {seeds[2]}"]
        assert [answer.model for answer in task.answers] == ["a", "b", "a"]
        assert task.answers[0].sampling == {
            "temperature": 1.0,
            "top_p": 0.5,
            "top_k": None,
            "max_new_tokens": 8,
        }
        assert task.margin is None
    store.close()


def test_batches_are_made_ahead_of_need_and_no_further(project: tuple[Store, int]) -> None:
    store, project_id = project
    ann = annotator(store, "ann")
    supply = Supply(store, project_id, PROMPTS, [Echo("a")], PLAN)
    supply.start()
    wait_until(lambda: num_ready(store, project_id) == 4)  # 2, which is fewer than 3, and 2 more
    assert supply.state().is_sampling
    for _ in range(2):
        assigned = next_task(store, project_id, ann)
        assert assigned is not None
        skip(store, project_id, ann, assigned.id)
    wait_until(lambda: not supply.state().is_sampling)  # others may take what was skipped, but ann needs more
    assert len(tasks(store)) == 5
    supply.stop()
    assert not supply.state().is_sampling
    store.close()


def test_an_annotator_alone_finds_all_tasks_of_an_overlap_of_two(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'labels.db'}")
    project_id = new_project(store, overlap=2)
    ann = annotator(store, "ann")
    supply = Supply(
        store, project_id, PROMPTS, [Echo("a")], Plan(sampling=PLAN.sampling, batch_size=1, ahead=1)
    )
    supply.start()
    seen = []
    while supply.state().is_sampling or num_ready(store, project_id):
        if (assigned := next_task(store, project_id, ann)) is not None:
            seen.append(assigned.id)
            submit(store, project_id, ann, Submission(assignment_id=assigned.id, verdict="tie", seconds=1))
    supply.stop()
    assert len(seen) == len(PROMPTS)
    store.close()


def test_a_restart_goes_on_where_it_was(project: tuple[Store, int]) -> None:
    store, project_id = project
    plan = Plan(sampling=PLAN.sampling, ahead=100)
    Supply(store, project_id, PROMPTS[:3], [Echo("a")], plan).work()
    second = Echo("a")
    Supply(store, project_id, PROMPTS, [second], plan).work()
    assert second.asked == [2, 2]  # two new prompts, two answers to each
    assert len(tasks(store)) == 5
    store.close()


def test_what_cannot_be_compared_is_left_out_and_said(
    project: tuple[Store, int], capsys: pytest.CaptureFixture[str]
) -> None:
    store, project_id = project
    long = (message("user", "A long one."),)
    plan = Plan(sampling=PLAN.sampling, ahead=100)
    Supply(store, project_id, [*PROMPTS, long], [Echo("a")], plan).work()
    assert "sampled 5 tasks from 6 prompts; 1 left out" in capsys.readouterr().err
    Supply(store, project_id, [*PROMPTS, long], [Echo("a", constant=True)], plan).work()
    assert "sampled 0 tasks from 1 prompts; 1 left out" in capsys.readouterr().err
    store.close()


def test_a_failure_ends_the_sampling_and_is_told(
    project: tuple[Store, int], capsys: pytest.CaptureFixture[str]
) -> None:
    store, project_id = project
    supply = Supply(store, project_id, PROMPTS, [Echo("a", fails=True)], PLAN)
    supply.start()
    wait_until(lambda: not supply.state().is_sampling)
    assert supply.state().problem == "the cache is too small"
    assert "make it larger" in capsys.readouterr().err
    supply.stop()
    store.close()


def test_scores_decide_which_task_comes_first(project: tuple[Store, int]) -> None:
    store, project_id = project
    scores = iter([0.0, 9.0, 5.0, 5.5, 1.0, 1.0, 0.0, 2.0, 3.0, 0.0])
    plan = Plan(sampling=PLAN.sampling, ahead=100)

    def scorer(answers: Sequence[Answer]) -> Scored:
        return Scored(torch.tensor([next(scores) for _ in answers]))

    Supply(store, project_id, PROMPTS, [Echo("a")], plan, scorer).work()
    assert [task.margin for task in tasks(store)] == [9.0, 0.5, 0.0, 2.0, 3.0]
    first = next_task(store, project_id, annotator(store, "ann"))
    assert first is not None
    assert first.messages[0]["content"] == "Say no."
    store.close()


def test_a_real_model_gives_the_same_answer_whatever_runs_beside_it(tmp_path: Path) -> None:
    model = load_answerer(str(save_tiny_model(tmp_path / "model")), device="cpu")
    sampling = Sampling(max_new_tokens=12)
    together = model.answers(PROMPTS, [1, 2, 3, 4, 5], sampling, lambda: False)
    alone = model.answers(PROMPTS[3:4], [4], sampling, lambda: False)
    assert [answer and answer.answer_ids for answer in alone] == [together[3] and together[3].answer_ids]
    assert all(answer is not None and 1 <= len(answer.answer_ids) <= 12 for answer in together)
    long = (message("user", "x" * 600),)
    assert model.answers([long, PROMPTS[0]], [1, 1], sampling, lambda: False)[0] is None
    stopped = model.answers(PROMPTS, [1, 2, 3, 4, 5], sampling, lambda: True)
    assert all(answer is not None and len(answer.answer_ids) == 1 for answer in stopped)


def test_the_scorer_reads_answers_in_the_reward_model_s_own_format(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    tokenizer = load_tokenizer(str(folder))
    pad = tokenizer.pad_token_id
    reward = load_scalar_model(folder, dtype=torch.float32, device="cpu", seed=3, pad_token_id=pad)
    save_model(reward, tokenizer, tmp_path / "reward", dtype=torch.float32)
    found = load_answerer(str(folder), device="cpu").answers(
        PROMPTS, range(5), Sampling(max_new_tokens=6), lambda: False
    )
    answers = [answer for answer in found if answer is not None]
    scores = reward_scorer(str(tmp_path / "reward"), device="cpu")(answers).scores_S
    chat = ChatFormat(tokenizer)
    for answer, score in zip(answers, scores, strict=True):
        ids = chat.conversation([*answer.messages, message("assistant", answer.text)])[0]
        with torch.no_grad():
            alone = reward(input_ids=torch.tensor([ids])).logits[0, 0]
        torch.testing.assert_close(score, alone)


def test_prompts_come_once_each_in_an_order_of_the_seed(tmp_path: Path) -> None:
    rows = [{"question": f"Q{number % 6}?", "answer": str(number)} for number in range(12)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    source = json.dumps({"path": str(file), "prompt": "question", "response": "answer"})
    first = read_prompts(source, seed=0)
    assert sorted(prompt[-1]["content"] for prompt in first) == [f"Q{number}?" for number in range(6)]
    assert read_prompts(source, seed=0) == first
    assert read_prompts(source, seed=1) != first
    with pytest.raises(ConfigError, match="colour"):
        read_prompts(f"{{path: {file}, colour: blue}}", seed=0)
    with pytest.raises(DataError, match="no such file"):
        read_prompts(str(tmp_path / "none.jsonl"), seed=0)
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "Once upon a time."}])
    with pytest.raises(DataError, match="hold no prompts"):
        read_prompts(str(texts), seed=0)


def test_nobody_waits_for_a_batch_that_is_under_way(project: tuple[Store, int]) -> None:
    store, project_id = project
    entered = threading.Event()

    class Slow(Echo):
        def answers(self, prompts, seeds, sampling, is_cancelled):  # type: ignore[no-untyped-def]
            entered.set()
            wait_until(is_cancelled)
            return super().answers(prompts, seeds, sampling, is_cancelled)

    supply = Supply(store, project_id, PROMPTS, [Slow("a")], PLAN)
    supply.start()
    assert entered.wait(60)
    supply.stop()
    assert tasks(store) == []
    store.close()
