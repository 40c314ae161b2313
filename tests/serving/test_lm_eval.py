"""lm-evaluation-harness against `dovetail serve`: the numbers of its own run of the model with transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.serving.test_demo_model import runs, url  # noqa: F401 (fixtures)

pytestmark = pytest.mark.system

IN_PYTHON = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from dovetail.serving.inference.harness import HarnessModel

run, output, *tasks = sys.argv[1:]
manager = TaskManager(include_path=".", include_defaults=False)
model = HarnessModel(run, device="cpu")
found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, log_samples=True)
said = {
    task: [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
    for task, rows in found["samples"].items()
}
with open(output, "w") as file:
    json.dump([found["results"], said], file, default=float)
"""
TASKS = Path(__file__).with_name("lm_eval_tasks")


def evaluate(
    model: str, arguments: str, tasks: Sequence[str], output: Path
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The scores of each task, and what the model said to each request."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments]
    command += ["--tasks", *tasks, "--include_path", ".", "--log_samples"]
    environment = {**os.environ, "HF_HOME": str(output / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--output_path", str(output)],
        cwd=TASKS,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = output.rglob("results_*.json")
    said = {}
    for task in tasks:
        (samples,) = output.rglob(f"samples_{task}_20*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        said[task] = [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
    return json.loads(results.read_text())["results"], said


def test_both_kinds_of_task_give_what_transformers_gives(
    runs: Path,  # noqa: F811
    url: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder, both = runs / "runs/demo/ppo/model", ("likeliest", "continued")
    served = f"model=ppo,base_url={url}/v1/completions,tokenizer={folder}"
    scores, said = evaluate("local-completions", served, (*both, "continued_by_default"), tmp_path / "served")
    expected_scores, expected = evaluate("hf", f"pretrained={folder},dtype=float32", both, tmp_path / "hf")
    for (text,), (more,), (expected_text,) in zip(
        said["continued"], said["continued_by_default"], expected["continued"], strict=True
    ):
        # lm_eval decodes what its own run generates by itself, which loses the space that it begins with.
        assert text.removeprefix(" ") == expected_text.removeprefix(" ")
        assert more.startswith(text)
    for row, expected_row in zip(said["likeliest"], expected["likeliest"], strict=True):
        for (logprob, is_greedy), (expected_logprob, expected_greedy) in zip(row, expected_row, strict=True):
            assert float(logprob) == pytest.approx(float(expected_logprob), rel=1e-4, abs=1e-4)
            assert is_greedy == expected_greedy
    for task, score in expected_scores.items():
        numbers = {name: value for name, value in score.items() if isinstance(value, float)}
        assert {name: scores[task][name] for name in numbers} == pytest.approx(numbers)
    assert {"acc,none", "exact_match,none"} <= {name for score in scores.values() for name in score}


def test_the_model_in_python_gives_what_transformers_gives(
    runs: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    both = ("likeliest", "continued")
    output = tmp_path / "ours.json"
    command = [sys.executable, "-c", IN_PYTHON, str(runs / "runs/demo"), str(output), *both]
    done = subprocess.run(command, cwd=TASKS, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    scores, said = json.loads(output.read_text())
    folder = runs / "runs/demo/ppo/model"
    expected_scores, expected = evaluate("hf", f"pretrained={folder},dtype=float32", both, tmp_path / "hf")
    for (text,), (expected_text,) in zip(said["continued"], expected["continued"], strict=True):
        assert text.removeprefix(" ") == expected_text.removeprefix(" ")
    for row, expected_row in zip(said["likeliest"], expected["likeliest"], strict=True):
        for (logprob, is_greedy), (expected_logprob, expected_greedy) in zip(row, expected_row, strict=True):
            assert float(logprob) == pytest.approx(float(expected_logprob), rel=1e-4, abs=1e-4)
            assert str(is_greedy) == str(expected_greedy)
    for task, score in expected_scores.items():
        numbers = {name: value for name, value in score.items() if isinstance(value, float)}
        assert {name: scores[task][name] for name in numbers} == pytest.approx(numbers)
