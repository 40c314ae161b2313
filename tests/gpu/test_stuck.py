"""One of two GPUs does not come to a collective of NCCL: that the other process spins for its GPU hides nothing."""

from pathlib import Path

import pytest
import torch

from tests.launch.test_stuck import HOST, stuck

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")]


@pytest.mark.parametrize(
    ("how", "who"), [("asleep", "(load_rows)"), ("frozen", f"rank 1 on {HOST} shows no sign of life")]
)
def test_a_rank_that_waits_for_its_gpu_is_stuck(how: str, who: str, tmp_path: Path) -> None:
    code, recorded, _ = stuck(how, tmp_path, "cuda")
    assert code == 3
    assert recorded is not None
    message = str(recorded["message"])
    assert "nothing has moved for 2 s" in message
    assert who in message
    assert "rank 0 stands at launch/stuck_worker.py:" in message
