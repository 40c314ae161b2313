"""What is saved is what was trained; what an engine of DeepSpeed's can do and ours cannot is refused by name."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dovetail.errors import ConfigError
from dovetail.model.copies import copy_of
from dovetail.parallel.world import World
from dovetail.rlhf.compat.deepspeed_chat import (
    DeepSpeedPPOTrainer,
    DeepSpeedRLHFEngine,
    convert_lora_to_linear_layer,
    moving_average,
    save_hf_format,
    save_zero_three_model,
)
from dovetail.rlhf.compat.models import expect_same_everywhere
from tests.fakes import tiny_model
from tests.rlhf.compat.tiny import arguments, prompt_batch, tiny
from tests.rlhf.tiny import tiny_reward_model
from tests.tolerance import assert_near


def trained(**changes: Any) -> DeepSpeedRLHFEngine:
    """An engine after two steps, its average updated once."""
    args = arguments(**changes)
    engine = tiny(args, name="opt")
    trainer = DeepSpeedPPOTrainer(engine, args)
    out = trainer.generate_experience(prompt_batch(engine))
    for _ in range(2):
        trainer.train_rlhf(out)
    if args.enable_ema:
        moving_average(engine.actor, engine.actor_ema, beta=0.25)
    return engine


def with_adapters(base: dict[str, Tensor], adapters: dict[str, Tensor], *, rank: int) -> dict[str, Tensor]:
    """The weights plus B A / rank, in float64. Fully trained weights in `adapters` take the place of the base's."""
    merged = {name: weight.double() for name, weight in base.items()}
    for name, weight in adapters.items():
        plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        if ".lora_B." in name:
            down = adapters[name.replace("lora_B", "lora_A")]
            merged[plain.replace(".lora_B.default", "")] += weight.double() @ down.double() / rank
        elif ".lora_A." not in name:
            merged[plain] = weight.double()
    if "lm_head.weight" in merged:
        merged["lm_head.weight"] = merged["model.decoder.embed_tokens.weight"]  # tied in OPT
    return merged


def learned(model: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "LoRA"])
def test_the_saved_folders_hold_what_was_trained(tmp_path: Path, rank: int) -> None:
    engine = trained(actor_lora_dim=rank, critic_lora_dim=rank, output_dir=str(tmp_path))
    bases = {
        "actor": tiny_model("opt").state_dict(),
        "critic": tiny_reward_model("opt").state_dict(),
        "actor_ema": tiny_model("opt").state_dict(),
    }
    changes = {
        "actor": learned(engine.engine.roles.actor),
        "critic": learned(engine.engine.roles.critic),
        "actor_ema": engine.engine.learners.ema.averages(),
    }
    expected = {name: with_adapters(bases[name], changes[name], rank=rank or 1) for name in bases}
    for name in bases:
        finished = convert_lora_to_linear_layer(getattr(engine, name))
        save_hf_format(finished, engine.tokenizer, engine.args, sub_folder=name)
        save_zero_three_model(finished, global_rank=0, save_dir=str(tmp_path / name), zero_stage=3)
    for name, auto in (
        ("actor", AutoModelForCausalLM),
        ("critic", AutoModelForSequenceClassification),
        ("actor_ema", AutoModelForCausalLM),
    ):
        loaded = auto.from_pretrained(tmp_path / name).state_dict()
        assert expected[name].keys() <= loaded.keys()
        differs = 0.0
        for key, weight in expected[name].items():
            rows = loaded[key][: len(weight)]  # a reward model may get a row for its pad token
            assert_near(rows, weight, dtype=torch.float32)
            differs = max(differs, (rows - bases[name][key]).abs().max().item())
        assert differs > 1e-4, name


def test_what_a_save_of_the_script_s_own_reads_is_plain_and_merged() -> None:
    engine = trained(actor_lora_dim=4)
    expected = with_adapters(tiny_model("opt").state_dict(), learned(engine.engine.roles.actor), rank=4)
    found = engine.actor.module.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert_near(found[name], weight, dtype=torch.float32)
    assert engine.actor.module.config.model_type == "opt"


def test_the_average_moves_by_beta() -> None:
    engine = trained()
    begin, end = tiny_model("opt").state_dict(), engine.actor.state_dict()
    average = engine.actor_ema.state_dict()
    for name in begin:
        assert_near(
            average[name], 0.25 * begin[name].double() + 0.75 * end[name].double(), dtype=torch.float32
        )


def test_an_average_of_another_model_is_refused() -> None:
    engine = tiny(arguments())
    for pair in ((engine.critic, engine.actor_ema), (engine.actor, engine.actor), (engine.actor, None)):
        with pytest.raises(ConfigError, match="not the engine's actor and its actor_ema"):
            moving_average(*pair)
    assert tiny(arguments(enable_ema=False)).actor_ema is None


@pytest.mark.parametrize("name", ["backward", "step", "optimizer", "save_checkpoint"])
@pytest.mark.parametrize("role", ["actor", "critic", "ref", "reward", "actor_ema"])
def test_what_only_deepspeed_s_engine_has_is_refused_by_name(role: str, name: str) -> None:
    model = getattr(tiny(arguments()), role)
    with pytest.raises(ConfigError, match=rf"{role}\.{name}: this attribute does not exist"):
        getattr(model, name)
    assert not hasattr(model, name)
    with pytest.raises(ConfigError, match=rf"{role}\.forward"):
        model(torch.zeros(1, 1, dtype=torch.long))


def test_a_reference_that_is_the_actor_cannot_be_taken_for_a_model() -> None:
    engine = tiny(arguments(actor_lora_dim=2))
    with pytest.raises(ConfigError, match=r"ref\.parameters"):
        engine.ref.parameters()
    with pytest.raises(ConfigError, match=r"ref\.state_dict"):
        engine.ref.state_dict()
    whole = tiny(arguments())
    assert whole.ref.state_dict().keys() == tiny_model().state_dict().keys()


def test_activation_checkpointing_is_switched_as_the_loop_switches_it() -> None:
    engine = tiny(arguments(actor_gradient_checkpointing=True))
    assert engine.actor.is_gradient_checkpointing
    engine.actor.gradient_checkpointing_disable()
    assert not engine.actor.is_gradient_checkpointing
    engine.actor.gradient_checkpointing_enable()
    assert engine.actor.is_gradient_checkpointing


def test_a_subclass_with_models_of_its_own_is_refused() -> None:
    kind = type("Mine", (DeepSpeedRLHFEngine,), {"_init_reward": lambda self: None})
    with pytest.raises(ConfigError, match=r"Mine\._init_reward is never called"):
        kind(tiny_model(), tiny_reward_model("llama"), None, arguments(), 1)


@dataclass(frozen=True)
class Two(World):
    """Two processes, the other of which was given `others`."""

    size: int = 2
    others: Any = None

    def gather(self, value: Any) -> list[Any]:
        return [value, self.others(dict(value))]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 6),
        ("actor_learning_rate", 0.5),
        ("num_total_iters", 11),
        ("critic", tiny_reward_model("gpt2")),
    ],
)
def test_processes_that_would_train_different_models_are_told_what_differs(name: str, value: Any) -> None:
    given = {**vars(arguments(local_rank=0)), "num_total_iters": 10, "critic": tiny_reward_model("llama")}
    theirs = {**given, "local_rank": 1}
    expect_same_everywhere(Two(others=lambda mine: as_words(theirs)), given)
    with pytest.raises(ConfigError, match=f"different values of {name}: "):
        expect_same_everywhere(Two(others=lambda mine: as_words({**theirs, name: value})), given)


def as_words(given: dict[str, Any]) -> Any:
    seen: list[Any] = []
    expect_same_everywhere(Two(others=lambda mine: seen.append(mine) or mine), given)
    return seen[0]


def test_nothing_saved_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no weights"):
        save_zero_three_model(object(), global_rank=0, save_dir=str(tmp_path / "actor"), zero_stage=3)
    save_zero_three_model(object(), global_rank=1, save_dir=str(tmp_path / "actor"), zero_stage=3)


def test_a_plain_model_passes_through(tmp_path: Path) -> None:
    engine = tiny(arguments())
    plain = copy_of(tiny_model())
    assert convert_lora_to_linear_layer(plain) is plain
    save_hf_format(plain, engine.tokenizer, Namespace(output_dir=str(tmp_path)))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in plain.state_dict().items())
