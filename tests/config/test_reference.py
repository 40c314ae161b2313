"""The page of all settings, and that each setting is described wherever it is explained."""

from pathlib import Path
from typing import Any

import pytest

from dovetail.config.explain import dotted, group_of, setting_names
from dovetail.config.load import load
from dovetail.config.reference import explanation, settings_page
from dovetail.config.run import RunConfig
from dovetail.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
LISTS = {name: f"{name}.0" for name in ("data.blend", "data.pretraining", "ppo.reward_function")}
REQUIRED = {"ppo.reward_function": "function: x"}


def described() -> dict[str, tuple[Any, str]]:
    """Dotted name of every setting -> its field, and its description in one line."""
    found = {}
    for path in setting_names(RunConfig):
        model: Any = RunConfig
        for part in path[:-1]:
            model = group_of(model.model_fields[part].annotation)
        field = model.model_fields[path[-1]]
        found[dotted(path)] = (field, " ".join(str(field.description).split()))
    return found


def test_the_page_is_what_the_settings_say_of_themselves() -> None:
    """If this fails: `make docs-settings`."""
    assert PAGE.read_text(encoding="utf-8") == settings_page()


def test_every_setting_is_described_on_the_page() -> None:
    page = settings_page()
    for name, (field, description) in described().items():
        assert field.description, name
        assert description.replace("|", "&#124;") in page, name


def test_names_types_and_defaults_are_those_of_the_configuration() -> None:
    rows = {}
    for line in settings_page().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            rows[cells[0].strip("`")] = cells[1:3]
    assert rows["sft.batch_size"] == ["whole number > 0", "`32`"]
    assert rows["ppo.batch_size"] == ["whole number > 0", "`64`"]
    assert rows["ppo.gamma"] == ["number >= 0 <= 1", "`1.0`"]
    assert rows["reward.optimizer.learning_rate"] == ["number >= 0", "`2e-05`"]
    assert rows["actor.path"] == ["text", "required"]
    assert rows["reward.start_from"] == ["`model`, `sft`", '`"model"`']
    assert rows["data.stage_split"][0] == "list: number >= 0, number >= 0, number >= 0 or null"
    assert "reward.optimizer.warmup_steps" not in rows  # as sft.optimizer's, which is said
    assert "As in `sft.optimizer`: `warmup_steps`." in settings_page()


def test_most_runs_need_few_settings() -> None:
    everyday, _, advanced = settings_page().partition("## Advanced")
    count = everyday.count("\n| `")
    assert f"These {count} settings" in everyday
    assert 40 < count <= 65
    assert "| `ppo.kl_coefficient`" in everyday
    assert "| `ppo.gamma`" in advanced


def test_advanced_settings_exist() -> None:
    models = {RunConfig, *(m for field, _ in described().values() if (m := group_of(field.annotation)))}
    for model in models:
        assert model.advanced <= set(model.model_fields), model.__name__


@pytest.mark.parametrize("name", described())
def test_every_setting_can_be_explained(name: str) -> None:
    field, description = described()[name]
    found = " ".join(explanation(name).split())
    if group_of(field.annotation) is None or isinstance(field.default, tuple):
        assert description.replace("`", "") in found
    else:
        assert description.rstrip(".") in found


def test_an_explanation_has_type_default_and_meaning() -> None:
    lines = explanation("ppo.gamma").splitlines()
    assert lines == ["ppo.gamma: number >= 0 <= 1, default 1.0; for experts", "  Discount per token."]
    assert explanation("data.blend.0.path") == explanation("data.blend.N.path")


def test_a_name_that_is_no_setting_leads_to_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"ppo\.kl_coeficient is not a setting") as caught:
        explanation("ppo.kl_coeficient")
    assert caught.value.hint == "did you mean ppo.kl_coefficient?"


@pytest.mark.parametrize("name", described())
def test_a_wrong_value_of_any_setting_is_answered_with_its_description(name: str) -> None:
    field, description = described()[name]
    place = next(
        (name.replace(key, item, 1) for key, item in LISTS.items() if name.startswith(f"{key}.")), name
    )
    sources = [f"{key}=[{{{REQUIRED.get(key, 'path: x')}}}]" for key in LISTS if name.startswith(f"{key}.")]
    wrong = (
        "{nonsense: [1]}" if group_of(field.annotation) is None or isinstance(field.default, tuple) else "[1]"
    )
    if name.endswith((".preference_values", ".tie_values")):  # of any values, but a list
        wrong = "7"
    with pytest.raises(ConfigError) as caught:
        load("opt-125m", [*sources, f"{place}={wrong}"])
    assert description in str(caught.value.hint)
