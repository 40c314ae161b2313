"""What an answer is worth: from a reward model, a Python function, or both.

Responsible for: turning answers into one score each. Not responsible for: clipping, penalties and the KL term,
which are part of the reward's definition in PPO (rlhf/rollout.py, maths/rewards.py).

Shapes: S answers.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.batches import balanced_parts, pack
from dovetail.data.records import Message
from dovetail.errors import ConfigError
from dovetail.model.forward import last_scores
from dovetail.text.chat_format import ChatFormat
from dovetail.training.memory import TokenBudget, retry_on_out_of_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One sampled answer, on the host."""

    messages: tuple[Message, ...]
    """The conversation up to and including the last user turn."""
    text: str
    """The answer, decoded, without the end-of-turn token."""
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """Exactly the sampled tokens, end-of-turn token included if it was sampled."""
    logprobs: tuple[float, ...]
    """Of the sampled tokens, under the generator."""
    finished: bool
    """False = cut off by the length limit."""


class Scorer(Protocol):
    """Anything that scores answers; higher is better."""

    def __call__(self, answers: Sequence[Answer]) -> Tensor:
        """float32 [S] on the CPU."""
        ...


RewardFunction = Callable[[Sequence[Answer]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class RewardModelScorer:
    """The score of a reward model at the answer's last token."""

    model: PreTrainedModel
    budget: TokenBudget
    device: torch.device
    chat: ChatFormat | None = None
    """The reward model's own chat format, if its tokenizer is not the actor's: answers go through text then."""

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer]) -> Tensor:
        sequences = [self._token_ids(answer) for answer in answers]
        return retry_on_out_of_memory(lambda: self._scores_S(sequences), self.budget)

    def _token_ids(self, answer: Answer) -> list[int]:
        if self.chat is None:
            return [*answer.prompt_ids, *answer.answer_ids]
        turn: Message = {"role": "assistant", "content": answer.text}
        return self.chat.conversation([*answer.messages, turn])[0]

    def _scores_S(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        scores_S = torch.zeros(len(sequences))
        for index in balanced_parts([len(ids) for ids in sequences], self.budget.tokens):
            part = [sequences[i] for i in index]
            batch = pack(part, [[False] * len(ids) for ids in part]).to(self.device)
            scores_S[torch.tensor(index)] = last_scores(self.model, batch).float().cpu()
        return scores_S


@dataclass(frozen=True, slots=True)
class FunctionScorer:
    """A Python function of the answers: `function(answers) -> one number per answer`."""

    function: RewardFunction
    name: str

    def __call__(self, answers: Sequence[Answer]) -> Tensor:
        scores = [float(score) for score in self.function(answers)]
        if len(scores) != len(answers):
            raise ConfigError(
                f"reward function {self.name} returned {len(scores)} scores for {len(answers)} answers",
                hint="return one number per answer, in the order given",
            )
        return torch.tensor(scores, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class SumScorer:
    """A reward model plus a weighted function."""

    first: Scorer
    second: Scorer
    weight: float

    def __call__(self, answers: Sequence[Answer]) -> Tensor:
        return self.first(answers) + self.weight * self.second(answers)


def load_reward_function(spec: str) -> FunctionScorer:
    """`package.module:function` or `path/to/file.py:function`. Raises ConfigError naming what is missing."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ConfigError(
            f"ppo.reward_function = {spec!r} names no function",
            hint="write package.module:function or path/to/file.py:function",
        )
    try:
        if place.endswith(".py"):
            module_spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert module_spec is not None
            assert module_spec.loader is not None
            module = importlib.util.module_from_spec(module_spec)
            module_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        function = getattr(module, name)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise ConfigError(
            f"ppo.reward_function = {spec!r} cannot be loaded: {error}",
            hint="check the path and that the module can be imported from where you start dovetail",
        ) from error
    return FunctionScorer(function, spec)
