"""The calculator calculates and nothing else, and the example's loop trains an actor with it."""

import pytest

from dovetail.config.stages import OptimizerConfig, PpoConfig, SamplingConfig
from examples.calculator import TOOLS, calculate, make_engine, prompts, train
from tests.fakes import byte_tokenizer, tiny_model
from tests.text.test_tools import QWEN


@pytest.mark.parametrize(
    ("expression", "value"), [("(12 + 7) * 3", "57"), ("-2 / 8", "-0.25"), ("999 * 999 - 1", "998000")]
)
def test_expressions_are_calculated(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize("expression", ["__import__('os')", "9 ** 9", "a + 1", "[1][0]", "1 if 1 else 2"])
def test_nothing_but_arithmetic_is_run(expression: str) -> None:
    with pytest.raises(ValueError, match="only numbers"):
        calculate(expression)


def test_the_answers_in_the_rows_are_right() -> None:
    for prompt in prompts(5, seed=1):
        question = prompt.messages[0]["content"].removeprefix("What is ").partition("?")[0]
        assert calculate(question) == prompt.row["answer"]


def test_the_loop_trains_with_the_tool_in_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer(QWEN.replace("<|im_end|>", "<|end|>"))
    model.config.max_position_embeddings = 1024
    monkeypatch.setattr("dovetail.rlhf.api.load_tokenizer", lambda name: tokenizer)
    config = PpoConfig(
        batch_size=8,
        sampling=SamplingConfig(max_new_tokens=12),
        actor_optimizer=OptimizerConfig(learning_rate=1e-3),
        kl_coefficient=0.1,
    )
    engine = make_engine(model, 2, config)
    assert len(train(engine, steps=2)) == 2
    environments = engine.roles.environments
    assert environments is not None
    text = tokenizer.decode(environments.chat.prompt_ids(prompts(1, seed=0)[0].messages))
    assert all(tool.__name__ in text for tool in TOOLS)
    assert "Calculate the value of an arithmetic expression." in text
