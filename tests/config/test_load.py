import re
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel

from dovetail.config import data, model, run, stages
from dovetail.config.explain import setting_names
from dovetail.config.load import dump, load, read_recipe
from dovetail.config.run import RunConfig
from dovetail.errors import ConfigError

SMALL = """\
actor:
  path: some/model
output_dir: runs/small
data:
  blend: [rm-static]
sft:
  epochs: 2
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return str(file)


def test_an_override_wins_over_a_flag_and_a_flag_over_the_recipe(recipe: str) -> None:
    assert load(recipe).sft.epochs == 2
    flags = {"sft.epochs": ("--epochs", 3), "seed": ("--seed", 5)}
    assert load(recipe, (), flags).sft.epochs == 3
    config = load(recipe, ["sft.epochs=4"], flags)
    assert (config.sft.epochs, config.seed) == (4, 5)


def test_a_renamed_setting_is_read_under_its_old_name_and_written_under_the_new_one(recipe: str) -> None:
    assert not load(recipe).ppo.offload_while_generating
    for name in ("park_optimizer", "offload_while_generating"):
        config = load(recipe, [f"ppo.{name}=true"])
        assert config.ppo.offload_while_generating
        assert "park_optimizer" not in dump(config)


def test_overrides_reach_groups_that_are_not_there_yet(recipe: str) -> None:
    config = load(recipe, ["actor.lora.rank=128", "ppo.sampling.temperature=0.9", "ppo.kl_stop=null"])
    assert config.actor.lora is not None
    assert config.actor.lora.rank == 128
    assert config.ppo.sampling.temperature == 0.9
    assert config.ppo.kl_stop is None


def test_a_blend_is_written_in_short_strings(recipe: str) -> None:
    config = load(recipe, ["data.blend=[rm-static:2, ./my_pairs.jsonl:0.5, C:/x.csv, plain]"])
    found = [(source.path, source.weight) for source in config.data.blend]
    assert found == [("rm-static", 2.0), ("./my_pairs.jsonl", 0.5), ("C:/x.csv", None), ("plain", None)]


def test_items_of_lists_are_counted_from_0(recipe: str) -> None:
    config = load(recipe, ["data.blend=[{path: a.csv}]", "data.blend.0.weight=3"])
    assert config.data.blend[0].weight == 3


def test_an_item_written_as_a_short_string_can_be_reached_into(recipe: str) -> None:
    (source,) = load(recipe, ["data.blend.0.weight=3"]).data.blend
    assert (source.path, source.weight) == ("rm-static", 3)
    first, second = load(recipe, ["data.blend=[a:2, b:2]", "data.blend.1.limit=5"]).data.blend
    assert (first.path, first.weight, first.limit) == ("a", 2, None)
    assert (second.path, second.weight, second.limit) == ("b", 2, 5)


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        (
            "sft.epoch=1",
            r"override 'sft\.epoch=1': sft\.epoch is not a setting",
            r"did you mean sft\.epochs\?",
        ),
        ("kl_coef=1", "kl_coef is not a setting", r"did you mean ppo\.kl_coefficient\?"),
        ("sft.optimizer.learning_rte=1", "is not a setting", r"did you mean sft\.optimizer\.learning_rate\?"),
        (
            "data.blend=[{path: a, wieght: 2}]",
            r"data\.blend\.0\.wieght",
            r"did you mean data\.blend\.0\.weight\?",
        ),
        ("qqqqq=1", "qqqqq is not a setting", "settings of a run: actor, reward_model, data"),
        ("sft.epochs=-1", r"sft\.epochs = -1: should be greater than 0", "Passes over the demonstrations"),
        ("sft.epochs=many", r"sft\.epochs = 'many'", "Passes over the demonstrations"),
        ("ppo.gamma=2", r"ppo\.gamma = 2: should be less than or equal to 1", "Discount per token"),
        ("precision=fp8", r"precision = 'fp8': should be 'auto', 'bf16', 'fp16' or 'fp32'", "bf16 where"),
        ("actor=opt", "actor = 'opt': this is a group of settings, not one value", "The model to be trained"),
        ("data.blend=rm-static", r"this is a list, such as \[rm-static\]", "Sources of all three stages"),
        ("sft.epochs.x=2", r"sft\.epochs is the value 2, which has no parts", r"set sft\.epochs itself"),
        ("data.blend.7.weight=2", "is a list of 1, and 7 is not an index of it", "count from 0"),
        (
            "data.blend.0.path.x=2",
            r"data\.blend\.0\.path is the value 'rm-static'",
            r"set data\.blend\.0\.path",
        ),
        ("data.blend.².weight=2", "is a list of 1, and ² is not an index of it", "count from 0"),
        ("sft.epochs=.inf", r"sft\.epochs = inf: should be a finite number", "Passes over"),
        ("ppo.kl_coefficient=.nan", r"ppo\.kl_coefficient = nan: should be a finite number", "Weight of"),
        ("sft.optimizer.betas=[0.9, 1.0]", r"betas\.1 = 1\.0: should be less than 1", "decay rates"),
        ("stages=[]", r"stages = \[\]: this is a list of at least 1", "The stages that run"),
        ("epochs", "'epochs' is not an override", "setting=value"),
        ("data.blend=[a", "not valid YAML", "brackets"),
    ],
)
def test_a_wrong_override_says_what_and_how_to_repair_it(
    recipe: str, override: str, message: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(recipe, [override])
    assert caught.value.hint is not None
    assert re.search(hint, caught.value.hint), caught.value.hint


def test_a_wrong_setting_in_a_file_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(SMALL + "ppo:\n  kl_coeficient: 0.1\n")
    with pytest.raises(
        ConfigError, match=r"wrong\.yaml line 9: ppo\.kl_coeficient is not a setting"
    ) as caught:
        load(str(file))
    assert caught.value.hint == "did you mean ppo.kl_coefficient?"


def test_all_wrong_settings_are_listed_at_once(recipe: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(recipe, ["sft.epoch=1", "reward.epochs=0", "seed=-1"])
    assert len(caught.value.message.splitlines()) == 3


def test_settings_that_do_not_fit_together_say_what_would(recipe: str) -> None:
    with pytest.raises(ConfigError, match="set batch_size to 66"):
        load(recipe, ["ppo.batch_size=64", "ppo.minibatches=3"])


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"actor is missing\noutput_dir is missing"):
        load(None)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", ""])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match="a recipe is a mapping of settings"):
        load(str(tmp_path / "x.yaml"))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "x.yaml")


def test_the_resolved_configuration_reads_back_to_itself(recipe: str, tmp_path: Path) -> None:
    config = load(recipe, ["ppo.kl_stop=null", "data.blend=[a:2, {path: b.csv, chosen: x, rejected: y}]"])
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load(str(tmp_path / "resolved.yaml")) == config


@pytest.mark.parametrize("module", [data, model, run, stages])
def test_every_setting_is_described(module: ModuleType) -> None:
    models = [
        value for value in vars(module).values() if isinstance(value, type) and issubclass(value, BaseModel)
    ]
    bare = [
        f"{m.__name__}.{name}"
        for m in models
        for name, field in m.model_fields.items()
        if not field.description
    ]
    assert models
    assert not bare


def test_settings_are_found_below_groups_options_and_lists() -> None:
    names = set(setting_names(RunConfig))
    assert {("seed",), ("actor", "lora", "rank"), ("data", "blend", "weight"), ("ppo", "sampling")} <= names


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("sft.optimizer.lr=1e-5", "sft.optimizer.learning_rate"),
        ("ppo.lr=1e-5", "ppo.actor_optimizer.learning_rate or ppo.critic_optimizer.learning_rate"),
        ("sft.bs=4", "sft.batch_size"),
        ("reward.optimizer.wd=0.1", "reward.optimizer.weight_decay"),
    ],
)
def test_the_initials_of_a_setting_lead_to_it(given: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("opt-125m", [given])
    assert caught.value.hint == f"did you mean {meant}?"


def test_lr_alone_lists_every_learning_rate() -> None:
    with pytest.raises(ConfigError, match="lr is not a setting") as caught:
        load("opt-125m", ["lr="])
    rates = [f"{stage}.learning_rate" for stage in ("sft.optimizer", "reward.optimizer")]
    rates += [f"ppo.{role}_optimizer.learning_rate" for role in ("actor", "critic")]
    rates += ["dpo.optimizer.learning_rate"]
    assert caught.value.hint == f"did you mean {' or '.join(rates)}?"


def test_the_output_folder_may_begin_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/rosa")
    assert load("opt-125m", ["output_dir=~/runs/a"]).output_dir == "/home/rosa/runs/a"


@pytest.mark.parametrize(
    ("text", "part", "expected"),
    [
        (
            "ppo.environment=game.py:Game",
            "ppo.environment.max_turns=3",
            {"source": "game.py:Game", "max_turns": 3},
        ),
        (
            "ppo.environment=game.py:TOOLS",
            "ppo.environment.fallback=-1",
            {"source": "game.py:TOOLS", "fallback": -1.0},
        ),
    ],
)
def test_a_text_that_stands_for_an_environment_can_be_added_to(
    text: str, part: str, expected: dict[str, object]
) -> None:
    environment = load("opt-1.3b", [text, part]).ppo.environment
    assert environment is not None
    assert environment.model_dump(exclude_unset=True) == expected


def test_a_text_in_a_list_of_reward_functions_can_be_added_to() -> None:
    config = load("opt-1.3b", ["ppo.reward_function=[exact, number]", "ppo.reward_function.1.weight=0.5"])
    assert [(term.function, term.weight) for term in config.ppo.reward_function] == [
        ("exact", 1.0),
        ("number", 0.5),
    ]
