"""The example trains adapters alone: the weights below them stay as they were."""

from dovetail import PPOTrainer, RLHFEngine
from dovetail.config.stages import SamplingConfig
from examples.lora import ADAPTERS, CONFIG, setup, trained_share
from tests.fakes import byte_tokenizer, tiny_model


def test_adapters_learn_and_the_weights_below_them_do_not() -> None:
    model = tiny_model()
    num_weights = sum(weight.numel() for weight in model.parameters())
    engine = RLHFEngine(
        actor_model=model,
        tokenizer=byte_tokenizer(),
        total_steps=1,
        config=CONFIG.model_copy(update={"sampling": SamplingConfig(max_new_tokens=4)}),
        reward=lambda answers: [float(len(set(answer.answer_ids))) for answer in answers],
        setup=setup("cpu"),
    )
    before = {name: weight.detach().clone() for name, weight in engine.roles.actor.named_parameters()}
    adapters = {name for name in before if "lora_" in name}
    size = sum(before[name].numel() for name in adapters)
    assert trained_share(engine) == size / (num_weights + size)
    assert all(ADAPTERS.rank in before[name].shape for name in adapters)
    trainer = PPOTrainer(engine)
    trainer.train_rlhf(trainer.generate_experience(["Tell me a story."] * 4))
    after = dict(engine.roles.actor.named_parameters())
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved
    assert moved <= adapters
