"""What held-out answers say of the actor, and of nothing else."""

from dovetail.config.stages import OptimizerConfig
from dovetail.rlhf.api import PPOTrainer, prompt_of
from dovetail.rlhf.evaluation import evaluate_answers
from tests.rlhf.tiny import PROMPTS, tiny_config, tiny_engine


def test_two_evaluations_of_the_same_weights_are_the_same_whatever_was_done_between() -> None:
    still = OptimizerConfig(learning_rate=0.0)
    trainer = PPOTrainer(tiny_engine("llama", tiny_config(actor_optimizer=still, critic_optimizer=still)))
    prompts = [prompt_of(prompt) for prompt in PROMPTS]
    first = evaluate_answers(prompts, trainer.engine)
    for _ in range(2):
        trainer.train_rlhf(trainer.generate_experience(PROMPTS))
    again = evaluate_answers(prompts, trainer.engine)
    assert [answer.answer_ids for answer in again.answers] == [a.answer_ids for a in first.answers]
    assert again.stats == first.stats
