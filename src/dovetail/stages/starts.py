"""The model that each stage starts from.

Responsible for: choosing between the results of earlier stages and the configured models, and refusing what cannot
start a stage. Not responsible for: loading them (models.py).
"""

from pathlib import Path
from typing import Protocol

from dovetail.config.model import ModelConfig
from dovetail.config.run import RunConfig, StageName
from dovetail.errors import ConfigError
from dovetail.model.load import expect_reward_head
from dovetail.runs.run_folder import RunFolder


class Run(Protocol):
    """A run, open or only looked at."""

    @property
    def config(self) -> RunConfig:
        """Its settings."""
        ...

    @property
    def folder(self) -> RunFolder:
        """Its folder."""
        ...

    def is_done(self, stage: StageName) -> bool:
        """Return whether the stage has finished."""
        ...


def actor_of(run: Run) -> ModelConfig:
    """Return the model that PPO or DPO starts from: stage 1's result, or the pretrained actor."""
    start = run.config.actor
    return _finished(start, run.folder.model("sft")) if run.is_done("sft") else start


def reward_start_of(run: Run) -> ModelConfig:
    """Return the model that stage 2 starts from."""
    start = run.config.reward_start()
    if run.config.reward.start_from == "sft":
        if not run.is_done("sft"):
            raise ConfigError(
                f"reward.start_from = sft, but {run.folder.model('sft')} is not finished",
                hint="run stage 1 first (dovetail sft), or set reward.start_from=model",
            )
        start = _finished(start, run.folder.model("sft"))
    return start


def reward_model_of(run: Run) -> ModelConfig | None:
    """Stage 2's result; else the configured model, if it is a finished reward model; None for a function alone."""
    config, folder = run.config, run.folder
    if run.is_done("reward"):
        return _finished(config.reward_start(), folder.model("reward"))
    if config.ppo.reward_function and config.ppo.reward_function_weight is None:
        return None
    if config.ppo.environment is not None and config.reward_model is None:
        return None
    if config.reward_model is None:
        raise ConfigError(
            f"PPO needs a reward model, and {folder.model('reward')} is not finished",
            hint="run stage 2 first, or set reward_model.path to a finished one, or ppo.reward_function",
        )
    model = config.reward_model
    expect_reward_head(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    return model


def _finished(start: ModelConfig, folder: Path) -> ModelConfig:
    """Return the result of a stage in place of its start; its tokenizer brings the chat template."""
    return start.model_copy(update={"path": str(folder), "revision": None, "chat_template": None})
