"""The notebooks run from the first cell to the last, on a model and for steps that take seconds."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.stages.runs import save_tiny_model

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
QUICK = {
    "device": "cpu",
    "precision": "fp32",
    "tracking.tensorboard": False,
    "data.max_tokens": 96,
    "data.max_prompt_tokens": 64,
    "data.max_eval_rows": 8,
    "ppo.sampling.max_new_tokens": 8,
    "ppo.cut_off_answers": "keep_score",
    **{f"{stage}.{name}": 2 for stage in ("sft", "reward", "ppo") for name in ("max_steps", "eval_every")},
    **{f"{stage}.batch_size": 8 for stage in ("sft", "reward", "ppo")},
}


def cells(notebook: Path) -> list[str]:
    """Return the code of each cell."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_of_a_notebook_runs(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = cells(notebook)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(first, names)  # its names are the only ones that a reader is asked to change
    assert {"MODEL", "RUNS", "SETTINGS"} <= names.keys()
    changed = {"ppo.minibatches": 1, **names["SETTINGS"], **QUICK}
    names |= {
        "MODEL": str(save_tiny_model(tmp_path / "model")),
        "RUNS": str(tmp_path / "runs"),
        "SETTINGS": changed,
    }
    monkeypatch.chdir(tmp_path)
    for code in others:
        exec(compile(code, notebook.name, "exec"), names)
    assert names["actor"].path.is_dir()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(notebook: Path) -> None:
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
