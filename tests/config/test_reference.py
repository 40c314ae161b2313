"""The page of all settings, and that each setting is described wherever it is explained."""

from pathlib import Path
from typing import Any

import pytest

from dovetail.config.explain import dotted, group_of, setting_names
from dovetail.config.load import load
from dovetail.config.reference import settings_page
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
    assert "As `sft.optimizer`, but for these defaults:" in settings_page()


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
