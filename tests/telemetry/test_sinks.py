import builtins
import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dovetail.errors import CheckpointError, ConfigError
from dovetail.telemetry.sinks import JsonlSink, TensorBoardSink, WandbSink


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_telemetry_can_be_imported_without_torch() -> None:
    modules = ", ".join(
        f"dovetail.telemetry.{name}" for name in ("log", "metrics", "sinks", "progress", "timing")
    )
    subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; assert 'torch' not in sys.modules"], check=True
    )


def test_a_row_is_one_json_line_with_its_step_and_time(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "run" / "metrics.jsonl", prefix="sft/", clock=lambda: 12.34567)
    sink.write(1, {"sft/loss": 0.1, "sft/tokens": 64.0})
    assert rows_of(sink.path) == [
        {"step": 1, "time": 12.346, "sft/loss": 0.1, "sft/tokens": 64.0}
    ]  # before close
    sink.close()


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", prefix="sft/")
    sink.write(1, {"sft/loss": math.nan, "sft/grad_norm": math.inf})
    sink.close()
    row = rows_of(sink.path)[0]
    assert row["sft/loss"] is None
    assert row["sft/grad_norm"] is None


def history(path: Path) -> None:
    """Five steps of stage 1, then three of PPO, the last line torn by a kill."""
    for prefix, steps in (("sft/", 5), ("ppo/", 3)):
        sink = JsonlSink(path, prefix=prefix)
        for step in range(1, steps + 1):
            sink.write(step, {f"{prefix}loss": 0.0})
        sink.close()
    with path.open("a") as file:
        file.write('{"step": 4, "ppo/lo')


def test_a_resumed_stage_drops_its_rows_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history(path)
    sink = JsonlSink(path, prefix="ppo/", start=2)
    sink.write(3, {"ppo/loss": 7.0})
    sink.close()
    steps = [(row["step"], name) for row in rows_of(path) for name in row if "/" in name]
    assert steps == [*((i, "sft/loss") for i in range(1, 6)), *((i, "ppo/loss") for i in range(1, 4))]
    assert rows_of(path)[-1]["ppo/loss"] == 7.0


def test_a_stage_that_begins_anew_drops_all_its_rows_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history(path)
    before = path.read_bytes().splitlines(keepends=True)
    JsonlSink(path, prefix="ppo/", start=0).close()
    assert path.read_bytes() == b"".join(before[:5])


def test_lines_of_other_origin_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('a note\n[1]\n{"step": 9, "ppo/loss": 1}\n')
    JsonlSink(path, prefix="ppo/", start=3).close()
    assert path.read_text() == "a note\n[1]\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", prefix="sft/")
    sink.close()
    with Path("/dev/full").open("wb", buffering=0) as full:
        sink._file = full
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: No space left") as caught:
            sink.write(1, {"sft/loss": 1.0})
    assert "last checkpoint" in str(caught.value.hint)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write metrics"):
        JsonlSink(tmp_path / "file" / "metrics.jsonl", prefix="sft/")


def scalars_of(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path / "sft")
    for step in range(1, 6):
        first.write(step, {"sft/loss": 1.0})
    first.close()
    (old,) = (tmp_path / "sft").iterdir()
    old.rename(old.with_name("events.out.tfevents.0000000001.host.1.0"))  # those of one second sort by chance
    second = TensorBoardSink(tmp_path / "sft", start=3)
    second.write(4, {"sft/loss": 2.0})
    second.close()
    assert scalars_of(tmp_path / "sft", "sft/loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = builtins.__import__

    def fake(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(package):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)


def test_a_missing_tracker_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without(monkeypatch, "wandb")
    with pytest.raises(ConfigError, match="wandb is not installed") as caught:
        WandbSink("project", name="run/sft")
    assert "pip install wandb" in str(caught.value.hint)
    without(monkeypatch, "torch.utils.tensorboard")
    with pytest.raises(ConfigError, match="tensorboard is not installed"):
        TensorBoardSink(tmp_path)


def test_wandb_gets_rows_under_the_runs_group(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda row, step: calls.append((step, row)),
        finish=lambda: calls.append("finish"),
    )

    def init(**settings: str) -> SimpleNamespace:
        calls.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    sink = WandbSink("chat", name="opt-13b/ppo")
    sink.write(2, {"ppo/loss": 1.0})
    sink.close()
    assert calls == [
        {"project": "chat", "name": "opt-13b/ppo", "group": "opt-13b"},
        (2, {"ppo/loss": 1.0}),
        "finish",
    ]


@pytest.mark.filterwarnings("ignore")
def test_the_real_wandb_keeps_every_row_without_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb", reason="needs the optional package wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = WandbSink("chat", name="opt-13b/ppo")
    sink.write(1, {"ppo/loss": 1.0})
    sink.write(3, {"ppo/loss": 0.5, "ppo/kl": 2.0})
    sink.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(file.read_bytes())
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.project, run.display_name, run.run_group) == ("chat", "opt-13b/ppo", "opt-13b")
    rows = [
        {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    found = [
        {name: value for name, value in row.items() if name in ("_step", "ppo/loss", "ppo/kl")}
        for row in rows
    ]
    assert found == [{"_step": 1, "ppo/loss": 1.0}, {"_step": 3, "ppo/loss": 0.5, "ppo/kl": 2.0}]


def wandb_records(data: bytes) -> list[Any]:
    """What a .wandb file of less than one block of 32 KiB holds: LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    records, place = [], 7
    while place < len(data):
        length, is_whole = struct.unpack("<HB", data[place + 4 : place + 7])
        assert is_whole == 1
        records.append(Record.FromString(data[place + 7 : place + 7 + length]))
        place += 7 + length
    return records
