"""The TRL peer of the PPO benchmark: it runs, and learns from answers of the lengths asked for."""

import importlib.util
from typing import Any

import pytest

from tests.benchmarks.test_benchmarks import FOLDER, TINY, run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="only `make bench` installs TRL"
)

# trl_ppo's own check of shapes and steps is inside the run; here what it does to the tokens, in a process of its own:
# importing TRL warns, and warnings are errors in this one.
PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
import json, torch, trl_ppo
ids = torch.tensor([[9, 9, 1, 2, 7, 8], [9, 9, 5, 6, 2, 1]])
print(json.dumps({"ids": trl_ppo.with_ends(ids, 2, [2, 4]).tolist()}))
"""


def test_answers_end_where_they_have_to_and_no_sooner(tmp_path: Any) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE, encoding="utf-8")
    [row] = run(str(probe), str(FOLDER))
    # 1 pads, 2 ends: neither is left from the draw, each answer has one end, and only padding behind it.
    assert row["ids"] == [[9, 9, 3, 2, 1, 1], [9, 9, 5, 6, 3, 2]]


def test_a_ppo_step_beside_trl_s() -> None:
    words = ["--reward", "tiny-350m", "--batch", "4", "--prompt", "8", "--new", "4", "--steps", "2"]
    *_, medians, peer, ratio = run("ppo_step.py", *TINY, *words, "--peer", "trl", "--trl-micro", "2")
    assert peer["system"] == "trl"
    assert peer["generate"] + peer["score"] + peer["train"] == pytest.approx(peer["seconds"], rel=1e-3)
    assert ratio["ratio_to_trl"] == pytest.approx(peer["seconds"] / medians["seconds"], rel=1e-3)
