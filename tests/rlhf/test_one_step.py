"""One PPO step enters few files, so that it can be read in one sitting."""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import pytest

import dovetail
from dovetail.data.records import Prompt
from dovetail.rlhf.api import PPOTrainer, prompt_of
from tests.rlhf.tiny import PROMPTS, tiny_config, tiny_engine

MOST_FILES = 25
SOURCES = str(Path(dovetail.__file__).parent) + "/"


def files_entered(trainer: PPOTrainer, prompts: list[Prompt]) -> Counter[str]:
    """Count the calls in each source file while one step is taken."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(SOURCES):
            calls[file.removeprefix(SOURCES)] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        trainer.train_rlhf(trainer.generate_experience(prompts))
    finally:
        sys.setprofile(before)
    return calls


def test_one_step_enters_few_files_and_none_of_tensor_parallelism(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = PPOTrainer(tiny_engine("llama", tiny_config(ppo_epochs=2, minibatches=2)))
    prompts = [prompt_of(text) for text in PROMPTS]  # as the loader of a run gives them
    trainer.train_rlhf(trainer.generate_experience(prompts))  # checks once what later steps rely on
    calls = files_entered(trainer, prompts)
    with capsys.disabled():
        sys.stdout.write(f"\none PPO step enters {len(calls)} files: {', '.join(sorted(calls))}\n")
    assert {"rlhf/rollout.py", "rlhf/update.py", "training/step.py", "maths/ppo.py"} <= calls.keys()
    assert not {file for file in calls if file.startswith(("config/", "parallel/tensor"))}
    assert len(calls) <= MOST_FILES, sorted(calls)
