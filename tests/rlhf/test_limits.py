"""What cannot be read, or not with the numbers it was drawn with, is refused with names and numbers."""

from __future__ import annotations

import pytest

from dovetail.errors import ConfigError
from dovetail.model.rope import rope_limit, rope_limit_in
from dovetail.rlhf.rewards import expect_room
from tests.model.test_rope import CONFIGS, LIMIT, model_with


@pytest.mark.parametrize("rope", CONFIGS)
def test_the_config_names_the_limit_of_the_rope(rope: str) -> None:
    assert rope_limit_in(CONFIGS[rope]) == rope_limit(model_with(rope)) == LIMIT


@pytest.mark.parametrize("rope", ["longrope", "longrope of another class"])
def test_answers_may_not_outgrow_a_rope_that_changes(rope: str) -> None:
    expect_room("actor", CONFIGS[rope], max_prompt_tokens=LIMIT - 8, max_new_tokens=8)
    with pytest.raises(ConfigError, match=f"the rope of the actor has other frequencies beyond {LIMIT}"):
        expect_room("actor", CONFIGS[rope], max_prompt_tokens=LIMIT - 8, max_new_tokens=9)
