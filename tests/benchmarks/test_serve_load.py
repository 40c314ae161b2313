"""The load script on a tiny model: it counts every token, and ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dovetail.model.load import save_model
from tests.fakes import byte_tokenizer, tiny_model

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"


@pytest.mark.slow
def test_the_load_script_measures_rates_and_memory(tmp_path: Path) -> None:
    save_model(tiny_model(), byte_tokenizer(), tmp_path / "tiny")
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "tiny", "--clients", "4", "--tokens", "8", "--requests", "40"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ratio"] == pytest.approx(
        found["tokens_per_second_all"] / found["tokens_per_second_one"], rel=0.05
    )
    assert found["growth"] == pytest.approx(found["mb_after_all"] / found["mb_after_quarter"] - 1, abs=0.01)
