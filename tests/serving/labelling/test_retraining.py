"""The loop closes: labels in a database, a reward model from it that prefers what they prefer."""

from pathlib import Path

import pytest
import torch

from dovetail.batches import pack
from dovetail.config.run import RunConfig
from dovetail.data.labels.database import open_store
from dovetail.data.labels.labels import Submission, submit
from dovetail.data.labels.queue import next_task
from dovetail.model.forward import last_scores
from dovetail.model.load import load_scalar_model
from dovetail.stages.pipeline import run
from dovetail.text.chat_format import ChatFormat
from dovetail.text.message import message
from dovetail.text.tokenizer import load_tokenizer
from tests.serving.labelling.work import annotator, new_project, task
from tests.stages.runs import tiny_run

WORDS = ["tea", "red", "a dog", "seven", "over there", "the sea", "once", "it is", "a song", "green"]


@pytest.mark.parametrize("liked", ["!", "?"])
def test_a_reward_model_from_the_database_prefers_what_the_labels_prefer(tmp_path: Path, liked: str) -> None:
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    store = open_store(url)
    pairs = [task(number, f"{word}!", f"{word}?") for number, word in enumerate(WORDS * 2)]
    project = new_project(store, *pairs)
    ann = annotator(store, "ann")
    while (assigned := next_task(store, project, ann)) is not None:
        chosen = [answer[-1] for answer in assigned.answers].index(liked)
        said = Submission(assignment_id=assigned.id, verdict="answer", chosen=chosen, seconds=1)
        submit(store, project, ann, said)
    store.close()
    config = RunConfig.model_validate(
        tiny_run(tmp_path).model_dump()
        | {
            "data": {"blend": [{"path": f"labels:{url}", "stages": ["reward"], "held_out": False}],
                     "cache_dir": str(tmp_path / "cache")},
            "stages": ["reward"],
        }
    )  # fmt: skip
    settings = config.reward.model_copy(
        update={"max_steps": 30, "save_every": 30, "eval_every": 30, "batch_size": 8}
    )
    run(config.model_copy(update={"reward": settings}))
    folder = str(tmp_path / "run" / "reward" / "model")
    model = load_scalar_model(folder, dtype=torch.float32, device="cpu", seed=0, pad_token_id=None)
    model.train(False)
    chat = ChatFormat(load_tokenizer(folder))

    def score(answer: str) -> float:
        ids = chat.conversation([message("user", "Question 77?"), message("assistant", answer)])[0]
        with torch.no_grad():
            return float(last_scores(model, pack([ids], [[False] * len(ids)])))

    disliked = "?" if liked == "!" else "!"
    for word in ("a cat", "blue", "later"):  # never labelled
        assert score(word + liked) > score(word + disliked)
