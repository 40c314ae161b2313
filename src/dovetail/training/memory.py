"""Work that does not fit in memory is done in smaller parts.

Responsible for: telling an out-of-memory error from others, halving the tokens of a micro-batch, trying
again.
Not responsible for: cutting a batch (batches.py), what is done with a part.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from dovetail.errors import TrainingStopped
from dovetail.telemetry.log import warn

R = TypeVar("R")

# The CPU allocator, cuBLAS and the CUDA driver raise plain RuntimeErrors; these are their words.
_MARKS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "not enough memory")


@dataclass(slots=True)
class TokenBudget:
    """Tokens of one forward and backward pass. Shared by all that run on a device, halved for all."""

    tokens: int
    may_shrink: bool = True
    """False where processes run the same passes together: one of them cannot go on in smaller parts alone."""
    _asked: int = field(init=False)

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"a micro-batch of {self.tokens} tokens holds nothing")
        self._asked = self.tokens

    def state_dict(self) -> dict[str, int]:
        """Return the budget that was asked for and the one in use."""
        return {"asked": self._asked, "tokens": self.tokens}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue with the budget in use if the same one was asked for; a new setting begins anew."""
        if state["asked"] == self._asked:
            self.tokens = state["tokens"]


def retry_on_out_of_memory(
    attempt: Callable[[], R],
    budget: TokenBudget,
    *,
    clean_up: Callable[[], None] | None = None,
    unit_tokens: Callable[[], Sequence[int]] | None = None,
) -> R:
    """`attempt()`, which reads `budget.tokens`; while it runs out of memory, halve the budget and try again.

    clean_up: undoes a failed attempt, so that a later one gives what a first one would have given.
    unit_tokens: the sizes of the units that cannot be cut (sequences). Asked after a failure: with them the
    budget is halved from what was really used, and the retries end as soon as halving cannot help.
    Raises TrainingStopped when one unit alone does not fit, or the budget may not shrink.
    """
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).split("\n")[0]
        # Here, outside the except block, the traceback is gone and with it the frames that held activations.
        if clean_up is not None:
            clean_up()
        _release_cached_memory()
        _halve(budget, unit_tokens() if unit_tokens else None, reason)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that an accelerator, the CPU allocator or Python found no memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)


def _halve(budget: TokenBudget, unit_tokens: Sequence[int] | None, reason: str) -> None:
    if not budget.may_shrink:
        raise TrainingStopped(
            f"a micro-batch of {budget.tokens} tokens does not fit in the memory of one of the processes ({reason})",
            hint=f"start again with micro_batch_tokens={max(1, budget.tokens // 2)}: the run goes on from its last "
            "checkpoint, and results do not depend on it",
        )
    longest = max(unit_tokens) if unit_tokens else 1
    used = min(budget.tokens, sum(unit_tokens)) if unit_tokens else budget.tokens
    if used <= longest:
        what = f"one sequence of {longest} tokens" if unit_tokens else "a micro-batch of one sequence"
        raise TrainingStopped(
            f"{what} does not fit in memory ({reason})",
            hint="turn on activation_checkpointing, lower data.max_tokens or ppo.sampling.max_new_tokens, "
            "train LoRA adapters (actor.lora), or use a smaller model",
        )
    warn(
        f"out of memory: micro-batches halved from {used} to {used // 2} tokens; results do not depend on it"
    )
    budget.tokens = used // 2


def _release_cached_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
