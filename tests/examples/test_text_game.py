"""The game follows its rules, and the example's loop trains an actor with it."""

from dovetail.config.stages import EnvironmentConfig, OptimizerConfig, PpoConfig, SamplingConfig
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.build import Setup
from dovetail.rlhf.environments import Step, Turn
from examples.text_game import GuessTheNumber, train
from tests.fakes import byte_tokenizer
from tests.rlhf.test_episodes import CHATML, ending_model


def test_hints_lead_to_the_number_and_only_sensible_guesses_earn_something() -> None:
    game = GuessTheNumber()
    assert "from 1 to 20" in game.reset({}, seed=46)  # the number is 7
    said = [game.step(Turn(text)) for text in ("10", "hm?", "12", "I say 3.", "2", "7")]
    assert [step.reward for step in said] == [0.1, 0.0, 0.0, 0.1, 0.0, 1.0]
    assert said[0].reply == "My number is lower than 10. Guess again."
    assert said[3].reply == "My number is higher than 3. Guess again."
    assert said[-1] == Step(reward=1.0, done=True)


def test_the_loop_takes_as_many_steps_as_it_is_told() -> None:
    engine = RLHFEngine(
        actor_model=ending_model(),
        tokenizer=byte_tokenizer(CHATML),
        total_steps=2,
        config=PpoConfig(
            batch_size=8,
            sampling=SamplingConfig(max_new_tokens=120),
            environment=EnvironmentConfig(source="GuessTheNumber", max_turns=2),
            actor_optimizer=OptimizerConfig(learning_rate=1e-3),
            cut_off_answers="keep_score",
        ),
        environment=GuessTheNumber,
        setup=Setup(device="cpu"),
    )
    before = engine.roles.actor.lm_head.weight.detach().clone()
    assert len(train(engine, steps=2)) == 2
    assert not before.equal(engine.roles.actor.lm_head.weight)
