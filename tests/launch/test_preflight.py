"""Two real processes over gloo, one of which may be odd; both must say the same of it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dovetail
from dovetail.errors import LaunchError
from dovetail.launch import preflight as module
from tests.parallel.group import new_store

WORKER = Path(__file__).parent / "preflight_worker.py"
HOST = socket.gethostname()
FAULTS = ("none", "version", "setting", "data", "folder", "file", "sum", "joined", "missing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preflight") / "run"


@pytest.fixture(scope="module")
def said(folder: Path) -> list[dict[str, str]]:
    """What each of two ranks made of every fault."""
    folder.with_name("run-file").write_text("not a folder")
    stores = {fault: new_store() for fault in FAULTS}  # as a launcher does, one for each time that they meet
    cases = [f"{fault}:{store.port}" for fault, store in stores.items()]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), rank, str(folder), *cases],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        )
        for rank in ("0", "1")
    ]
    try:
        results = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], results
    return [json.loads(out) for out, _ in results]


def test_a_sound_world_passes_and_leaves_nothing_behind(said: list[dict[str, str]], folder: Path) -> None:
    assert [of_rank["none"] for of_rank in said] == ["ok, left"] * 2
    assert list(folder.iterdir()) == []


def test_a_process_group_that_stands_already_is_used_and_kept(said: list[dict[str, str]]) -> None:
    assert [of_rank["joined"] for of_rank in said] == ["ok, still joined"] * 2


def test_a_folder_that_is_not_shared_is_named(said: list[dict[str, str]], folder: Path) -> None:
    message = (
        f"rank 1 on {HOST} does not see what rank 0 on {HOST} wrote to {folder}: its output_dir is "
        f"{folder}-elsewhere"
    )
    assert [of_rank["folder"] for of_rank in said] == [message] * 2


def test_other_versions_on_a_rank_are_named(said: list[dict[str, str]]) -> None:
    message = f"rank 1 on {HOST} has dovetail 0.0.7 (rank 0: {dovetail.__version__}); rank 0 is on {HOST}"
    assert [of_rank["version"] for of_rank in said] == [message] * 2


@pytest.mark.parametrize(
    ("fault", "difference"),
    [
        ("setting", "ppo.gamma = 0.9 (rank 0: 1.0)"),
        ("data", "pairs.jsonl: 12 bytes, hash ab (rank 0: 12 bytes, hash cd)"),
    ],
)
def test_other_settings_or_files_on_a_rank_are_named(
    said: list[dict[str, str]], fault: str, difference: str
) -> None:
    message = f"rank 1 on {HOST} has {difference}; rank 0 is on {HOST}"
    assert [of_rank[fault] for of_rank in said] == [message] * 2


def test_a_wrong_sum_is_named(said: list[dict[str, str]]) -> None:
    message = "the all-reduce of 1 to 2 on cpu gave 7 and not 3"
    assert [of_rank["sum"] for of_rank in said] == [message] * 2


def test_a_folder_that_cannot_be_written_is_named(said: list[dict[str, str]], folder: Path) -> None:
    start = f"rank 0 on {HOST} cannot write to {folder}-file: "
    assert all(of_rank["file"].startswith(start) for of_rank in said)


def test_a_rank_that_does_not_come_ends_the_wait(said: list[dict[str, str]]) -> None:
    assert said[0]["missing"].startswith("this process could not join the others at 127.0.0.1:")
    assert "within 2 s" in said[0]["missing"]


def test_more_processes_than_gpus_on_a_machine_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("LOCAL_RANK", "2"), ("RANK", "10")):
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=rf"rank 10 is process 2 \(from 0\) of {HOST}, which has 2 GPUs"):
        module._device()
