"""Prompts come in the order of their epochs, and a resumed run goes on where the last step ended."""

import pytest

from dovetail.data.loader import BatchOrder
from dovetail.data.records import Prompt, message
from dovetail.stages.prompt_queue import PromptQueue

PROMPTS = [Prompt(messages=(message("user", str(i)),)) for i in range(7)]


@pytest.mark.parametrize("counts", [[3, 3, 3], [1, 6, 2], [20, 1], [0, 5]])
def test_prompts_come_as_batches_of_any_size_would_hold_them(counts: list[int]) -> None:
    queue, order = PromptQueue(PROMPTS, seed=4), BatchOrder(7, 3, seed=4)
    expected = [PROMPTS[row] for step in range(9) for row in order.batch(step)]
    taken = [prompt for count in counts for prompt in queue.take(count)]
    assert taken == expected[: sum(counts)]


def test_a_resumed_run_goes_on_after_what_was_settled() -> None:
    queue = PromptQueue(PROMPTS, seed=1)
    queue.take(4)
    queue.settle()
    state = queue.state_dict()
    lost = queue.take(5)
    assert queue.state_dict() == state
    resumed = PromptQueue(PROMPTS, seed=1)
    resumed.load_state_dict(state)
    assert resumed.take(5) == lost
    assert resumed.take(3) == queue.take(3)
