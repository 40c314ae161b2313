"""What `pip install .` gives, away from the sources: commands, recipes and registry are in it, and it trains."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dovetail.config.load import dump
from tests.stages.runs import tiny_run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package in a folder of its own, built from a copy: building leaves files beside the sources."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    target = tmp_path_factory.mktemp("installed")
    pip = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    )
    subprocess.run([*pip, "--target", str(target), str(copy)], check=True)
    return target


def dovetail(installed: Path, *arguments: str) -> str:
    """What a command of the installed package prints; it must end well."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(installed / "bin/dovetail"), *arguments],
        cwd=installed,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_installed_package_is_the_one_that_runs(installed: Path) -> None:
    script = "import dovetail, dovetail.config.recipes as r; print(dovetail.__file__, len(r.recipe_names()))"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=installed,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    file, recipes = done.stdout.split()
    assert Path(file).is_relative_to(installed)
    assert int(recipes) == len(list((ROOT / "recipes").glob("*.yaml")))


def test_help_and_doctor_work(installed: Path) -> None:
    assert "dovetail demo" in dovetail(installed, "--help")
    assert "MISSING" not in dovetail(installed, "doctor")


def test_three_stages_and_a_chat_work(installed: Path, tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(config), encoding="utf-8")
    assert "talk to it" in dovetail(installed, "train", str(recipe))
    dovetail(installed, "chat", config.output_dir, "-p", "hello", "--max-new-tokens", "8", "--device", "cpu")
    for model in ("sft/model", "reward/model", "ppo/model"):
        assert (tmp_path / "run" / model / "model.safetensors").is_file()


def test_the_labelling_pages_and_migrations_are_in_it(installed: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'labels.db'}"
    assert len(dovetail(installed, "label", "invite", "ann", "--store", store).strip()) == 43
    script = (
        "import sys; from dovetail.data.labels.database import open_store; "
        "from dovetail.serving.labelling.router import labelling_router; labelling_router(open_store(sys.argv[1]), 1)"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    subprocess.run(
        [sys.executable, "-c", script, store], cwd=tmp_path, env=environment, check=True, timeout=300
    )
