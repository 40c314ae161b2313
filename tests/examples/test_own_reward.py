"""The example scores by its own function, and its loop trains the actor."""

from dovetail.config.stages import OptimizerConfig, PpoConfig, SamplingConfig
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.build import Setup
from dovetail.rlhf.rewards import Answer
from examples.own_reward import share_of_e, train
from tests.fakes import byte_tokenizer, tiny_model


def answer(text: str) -> Answer:
    return Answer(messages=(), text=text, prompt_ids=(), answer_ids=(), logprobs=(), finished=True)


def test_the_score_is_the_share_of_the_letter() -> None:
    assert share_of_e([answer("eel"), answer("sun"), answer("")]) == [2 / 3, 0.0, 0.0]


def test_the_loop_takes_as_many_steps_as_it_is_told() -> None:
    engine = RLHFEngine(
        actor_model=tiny_model(),
        tokenizer=byte_tokenizer(),
        total_steps=2,
        config=PpoConfig(
            sampling=SamplingConfig(max_new_tokens=4), actor_optimizer=OptimizerConfig(learning_rate=1e-3)
        ),
        reward=share_of_e,
        setup=Setup(device="cpu"),
    )
    before = engine.roles.actor.lm_head.weight.detach().clone()
    scores = train(engine, steps=2)
    assert len(scores) == 2
    assert all(0 <= score <= 1 for score in scores)
    assert not before.equal(engine.roles.actor.lm_head.weight)
