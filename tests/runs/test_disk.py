import errno
from pathlib import Path
from typing import BinaryIO

import pytest

from dovetail.errors import CheckpointError
from dovetail.runs.disk import FullDisk, open_file, write_atomically


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "summary.json"
    write_atomically(path, "one")
    write_atomically(path, "äöü\n")
    assert path.read_text(encoding="utf-8") == "äöü\n"
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


def test_a_full_disk_keeps_the_old_file_and_leaves_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "the old text")
    with pytest.raises(CheckpointError, match=r"no room to write .*summary\.json: 4,000 bytes needed"):
        write_atomically(path, "x" * 4000, open_file=FullDisk(free_bytes=1000))
    assert path.read_text() == "the old text"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_kernels_own_full_device_is_understood(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_atomically(tmp_path / "done", "x", open_file=lambda path: open_file(Path("/dev/full")))


def test_other_refusals_are_told_as_they_are(tmp_path: Path) -> None:
    def refuse(path: Path) -> BinaryIO:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with pytest.raises(CheckpointError, match="Read-only file system") as caught:
        write_atomically(tmp_path / "done", "x", open_file=refuse)
    assert "may write" in str(caught.value.hint)


def test_a_full_disk_takes_what_has_room() -> None:
    disk = FullDisk(free_bytes=10)
    with pytest.raises(OSError, match="No space left"), disk(Path("/dev/null")) as file:
        file.write(b"x" * 11)
    assert disk.free_bytes == 0
