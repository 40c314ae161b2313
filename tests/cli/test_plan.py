"""`dovetail plan`: from a name or a config alone, without torch, in words and as JSON."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dovetail.cli.main import main
from tests.fakes import TINY

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `dovetail plan` in this process: exit code, stdout, stderr."""

    def run_command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(("plan", *arguments))
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run_command


def test_a_recipe_is_planned_in_words(run: Run) -> None:
    code, out, _ = run("opt-1.3b", "--gpu", "h100")
    assert code == 0
    assert "opt-1.3b (1.32B weights) with opt-350m as reward model (331M), 1 x H100 80GB" in out
    assert "KV cache" in out
    assert "fits: " in out
    assert "all stages: " in out


def test_what_does_not_fit_is_told_with_what_would(run: Run) -> None:
    code, out, _ = run("opt-13b", "actor.lora=null", "--gpu", "a100-80g")
    assert code == 0
    assert "does not fit: " in out
    assert "it fits with actor.lora.rank=64: " in out
    assert "no setting that is known makes it fit" in run("opt-175b", "--gpu", "l4")[1]


def test_the_same_as_json(run: Run) -> None:
    code, out, _ = run("opt-13b", "actor.lora=null", "--gpu", "a100-80g", "--json", "--price", "2")
    found = json.loads(out)
    assert code == 0
    assert found["fits"] is False
    assert found["dollars"] == pytest.approx(found["seconds"] / 3600 * 2)
    ppo = found["stages"][-1]
    assert sum(ppo["phases"][0]["bytes"].values()) == pytest.approx(ppo["phases"][0]["peak_bytes"])
    assert found["fits_with"][0]["fits"] is True


def test_a_folder_with_nothing_but_a_config_is_planned(run: Run, tmp_path: Path) -> None:
    TINY["qwen3"]().save_pretrained(tmp_path)
    for model in (tmp_path, tmp_path / "config.json"):
        code, out, err = run("--actor-model", str(model), "--reward-model", str(model))
        assert code == 0, err
        assert "fits: " in out


def test_stages_and_gpus_are_chosen_by_flag(run: Run) -> None:
    code, out, _ = run("opt-1.3b", "--step", "sft", "--num-gpus", "2", "--num-nodes", "2")
    assert code == 0
    assert "2 x H100 80GB on each of 2 nodes" in out
    assert "PPO: " not in out


@pytest.mark.parametrize(("arguments", "problem"), [
    (("opt-1.3b", "--gpu", "h1000"), "--gpu h1000: not in the catalogue"),
    (("opt-1.3b", "--gpu", "a100"), "--gpu a100: there are several"),
    (("opt-1.3b", "actor.path=nobody/nothing"), "nobody/nothing: no such folder or config.json"),
    (("opt-1.3b", "ppo.batch=3"), "ppo.batch"),
])  # fmt: skip
def test_mistakes_are_explained(run: Run, arguments: tuple[str, ...], problem: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert problem in err
    assert "hint: " in err


def test_gpus_and_models_are_listed(run: Run) -> None:
    assert "h200-141g" in run("--gpus")[1]
    assert "qwen3-8b" in run("--models")[1].splitlines()
    assert "Tables 1 and 2" in run("--sweep")[1]


def test_a_plan_imports_no_torch_and_no_transformers() -> None:
    code = (
        "import sys; from dovetail.cli.main import main\n"
        "try: main(['plan', 'opt-13b', '--gpu', 'l4'])\n"
        "finally: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
