import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.errors import CheckpointError
from dovetail.parallel.world import World
from dovetail.runs.checkpoint import Checkpoints
from dovetail.runs.checksums import find_corrupted
from dovetail.runs.disk import FullDisk, open_file

SIZE = 1000


def state(step: int) -> dict[str, Any]:
    return {"weights": {"w": torch.full((SIZE,), float(step))}, "kl_coefficient": 0.1 + step, "best": None}


def is_state(found: dict[str, Any], step: int) -> bool:
    own = state(step)
    same_values = {k: v for k, v in found.items() if k != "weights"} == {
        k: v for k, v in own.items() if k != "weights"
    }
    return same_values and torch.equal(found["weights"]["w"], own["weights"]["w"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def saved(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder / "checkpoints", keep=keep)
    for step in steps:
        checkpoints.save(step, state(step))
    return checkpoints


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    before = {
        "model": {"a.weight": torch.randn(3, 4, generator=generator).bfloat16(), "a.bias": torch.zeros(())},
        "optimizer": {"moments": [torch.randn(2, generator=generator).double(), {"step": torch.tensor(7.0)}]},
        "random": generator.get_state(),
        "plain": {
            "iteration": 12,
            "beta": 0.1 + 0.2,
            "tiny": 5e-324,
            "name": "ü",
            "none": None,
            "yes": True,
            "pair": (1, 2),
        },
        "empty": {},
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(12, before)
    found = checkpoints.latest()
    assert found is not None
    step, after = found
    assert step == 12
    torch.testing.assert_close(after["model"], before["model"], rtol=0, atol=0)
    torch.testing.assert_close(after["optimizer"], before["optimizer"], rtol=0, atol=0)
    assert after["model"]["a.weight"].dtype == torch.bfloat16
    assert after["plain"] == {**before["plain"], "pair": [1, 2]}
    assert after["empty"] == {}
    again = torch.Generator()
    again.set_state(after["random"])
    assert torch.equal(torch.rand(5, generator=again), torch.rand(5, generator=generator))


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "not" / "there").latest() is None


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 5, 100, 20_000, 300_000_000, keep=2)
    assert names(checkpoints.folder) == ["step-00020000", "step-300000000"]
    found = checkpoints.latest()
    assert found is not None
    assert is_state(found[1], 300_000_000)


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    metrics = {1: None, 2: -0.5, 3: -0.25, 4: math.nan, 5: -0.75, 6: math.inf, 7: None}
    for step, metric in metrics.items():
        checkpoints.save(step, state(step), metric=metric)
    assert names(tmp_path) == ["step-00000003", "step-00000006", "step-00000007"]
    found = checkpoints.best()
    assert found is not None
    assert found[0] == 3
    assert is_state(found[1], 3)
    checkpoints.save(8, state(8), metric=-0.25)  # as good, and newer
    assert names(tmp_path) == ["step-00000007", "step-00000008"]


def test_a_damaged_best_is_named_and_does_not_stop_a_run(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state(1), metric=0.0)
    checkpoints.save(2, state(2))
    damage_flip(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match=r"step-00000001 is damaged: .*SHA-256"):
        checkpoints.best()
    damage_manifest(tmp_path / "step-00000001")
    assert checkpoints.best() is None
    checkpoints.save(3, state(3))
    found = checkpoints.latest()
    assert found is not None
    assert found[0] == 3


def damage_flip(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def damage_cut(folder: Path) -> None:
    os.truncate(folder / "tensors.safetensors", 100)


def damage_values(folder: Path) -> None:
    (folder / "state.json").write_text('{"weights": {}}')


def damage_missing(folder: Path) -> None:
    (folder / "state.json").unlink()


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def damage_manifest_entry(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": {}}')


DAMAGES = [damage_flip, damage_cut, damage_values, damage_missing, damage_manifest, damage_manifest_entry]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(
    damage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    damage(checkpoints.folder / "step-00000002")
    found = checkpoints.latest()
    assert found is not None
    assert found[0] == 1
    assert is_state(found[1], 1)
    assert "step-00000002 is damaged" in capsys.readouterr().err


def test_of_several_processes_each_reads_some_of_the_files_and_any_may_find_damage(tmp_path: Path) -> None:
    class Two(World):
        """This process and another, which is asked through `theirs`."""

        def gather(self, value: Any) -> list[Any]:
            return [value, theirs.pop(0)]

        def from_first(self, value: Any) -> Any:
            return value

    folder = saved(tmp_path, 1, 2).folder
    newest = folder / "step-00000002"
    damage_flip(newest)
    shares = [find_corrupted(newest, rank=rank, size=2) for rank in range(2)]
    assert [share is None for share in shares] == [True, False]
    assert "tensors.safetensors have changed" in str(shares[1])
    theirs = [shares[1], None]
    found = Checkpoints(folder, world=Two(rank=0, size=2, is_group=True)).latest()
    assert found is not None
    assert found[0] == 1


def test_a_process_that_does_not_see_a_file_says_so_and_no_checkpoint_counts_as_damaged(
    tmp_path: Path,
) -> None:
    newest = saved(tmp_path, 1).folder / "step-00000001"
    damage_missing(newest)
    with pytest.raises(CheckpointError, match=r"state\.json is not there for process 0") as caught:
        find_corrupted(newest, rank=0, size=2)
    assert "all machines share" in str(caught.value.hint)


def test_a_damaged_checkpoint_is_replaced_by_the_resumed_run_and_does_not_count_as_kept(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path, 1, 2).folder
    damage_flip(folder / "step-00000002")
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.latest()
    checkpoints.save(2, state(2))
    assert names(folder) == ["step-00000001", "step-00000002.1"]
    found = Checkpoints(folder).latest()
    assert found is not None
    assert is_state(found[1], 2)


def test_when_all_are_damaged_the_run_says_so(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    for name in names(checkpoints.folder):
        damage_cut(checkpoints.folder / name)
    with pytest.raises(CheckpointError, match="all 2 checkpoints"):
        checkpoints.latest()


def test_saving_a_step_again_never_leaves_a_moment_without_it(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 3, 3, 3, keep=1)
    assert names(checkpoints.folder) == ["step-00000003.2"]


@pytest.mark.parametrize("free", [0, 100, SIZE * 4, SIZE * 4 + 300, SIZE * 4 + 400])
def test_a_full_disk_loses_nothing_and_leaves_no_rest(free: int, tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2).folder
    with pytest.raises(CheckpointError, match=r"no room to write .*step-00000003: 4,\d\d\d bytes") as caught:
        Checkpoints(folder, keep=1, open_file=FullDisk(free)).save(3, state(3))
    assert "keep_checkpoints" in str(caught.value.hint)
    assert names(folder) == ["step-00000001", "step-00000002"]
    found = Checkpoints(folder).latest()
    assert found is not None
    assert is_state(found[1], 2)


def test_a_full_disk_is_noticed_whichever_file_it_hits(tmp_path: Path) -> None:
    for name in ("tensors.safetensors", "state.json", "manifest.json"):

        def full_at(path: Path, name: str = name) -> Any:
            return FullDisk(0)(path) if path.name == name else open_file(path)

        with pytest.raises(CheckpointError, match="No space left"):
            Checkpoints(tmp_path / "checkpoints", open_file=full_at).save(1, state(1))
        assert names(tmp_path / "checkpoints") == []


REALLY_FULL = """
    import sys, torch
    from pathlib import Path
    from dovetail.errors import CheckpointError
    from dovetail.runs.checkpoint import Checkpoints
    checkpoints = Checkpoints(Path(sys.argv[1]) / "checkpoints", keep=3)
    checkpoints.save(1, {"w": torch.ones(100_000)})
    checkpoints.save(2, {"w": torch.full((100_000,), 2.0)})
    try:
        checkpoints.save(3, {"w": torch.ones(100_000)})
    except CheckpointError as error:
        assert "No space left on device" in error.message, error
        step, state = checkpoints.latest()
        assert step == 2 and bool((state["w"] == 2).all())
        assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["step-00000001", "step-00000002"]
        print("survived")
"""


def test_a_really_full_file_system_loses_nothing(tmp_path: Path) -> None:
    """A tmpfs of one MiB, in a user namespace of its own where the kernel allows that."""
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("needs unprivileged mounts")
    command = [*mount, sys.executable, "-c", textwrap.dedent(REALLY_FULL), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "survived\n", done.stderr


def test_what_a_killed_save_leaves_is_no_checkpoint_and_is_swept_up(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1).folder
    shutil.copytree(folder / "step-00000001", folder / ".writing-step-00000002")
    (folder / ".writing-step-00000002" / "manifest.json").unlink()
    (folder / ".deleting-step-00000000").mkdir()
    found = Checkpoints(folder).latest()
    assert found is not None
    assert found[0] == 1
    Checkpoints(folder).save(2, state(2))
    assert names(folder) == ["step-00000001", "step-00000002"]


SAVES_FOREVER = """
    import sys, torch
    from pathlib import Path
    from dovetail.runs.checkpoint import Checkpoints
    checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
    step = 0
    while True:
        step += 1
        checkpoints.save(step, {"w": torch.full((300_000,), float(step)), "step": step})
        print(step, flush=True)
"""


def test_kill_minus_nine_at_any_moment_leaves_the_last_finished_checkpoint(tmp_path: Path) -> None:
    for delay in (0.0, 0.005):
        command = [sys.executable, "-c", textwrap.dedent(SAVES_FOREVER), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(3):
                finished = int(process.stdout.readline())
            time.sleep(delay)  # so that the kills come at different moments of a save
            process.send_signal(signal.SIGKILL)
            finished = max([finished, *(int(line) for line in process.stdout if line.endswith("\n"))])
        found = Checkpoints(tmp_path).latest()
        assert found is not None
        step, after = found
        assert step >= finished
        assert after["step"] == step
        assert bool((after["w"] == step).all())
        shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": {"b": object()}}, "a/b: a object cannot be part of a state"),
        ({"a": torch.float32}, "a: a dtype cannot"),
        ({"a": {1: 2}}, "a: keys of a state are strings"),
        ({"$tensor": "w"}, "state: keys of a state"),
    ],
)
def test_what_cannot_be_saved_is_named_before_anything_is_written(
    bad: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=message.replace("$", r"\$")):
        Checkpoints(tmp_path / "checkpoints").save(1, bad)
    assert not (tmp_path / "checkpoints").exists()


def test_two_tensors_cannot_share_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both called a/b"):
        Checkpoints(tmp_path).save(1, {"a": {"b": torch.ones(1)}, "a/b": torch.ones(1)})


def test_no_pickle_is_written(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1).folder / "step-00000001"
    assert names(folder) == ["manifest.json", "state.json", "tensors.safetensors"]
    json.loads((folder / "state.json").read_text())


def test_at_least_one_checkpoint_must_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep = 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_disk_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(1, state(1))
