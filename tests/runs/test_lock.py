import errno
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dovetail.errors import CheckpointError
from dovetail.runs import lock
from dovetail.runs.lock import FolderLock

HOLDS = """
    import sys, time
    from pathlib import Path
    from dovetail.runs.lock import FolderLock
    held = FolderLock(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_dead_even_if_it_was_killed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", textwrap.dedent(HOLDS), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"in use by process {process.pid} on "):
            FolderLock(path)
        process.send_signal(signal.SIGKILL)
    FolderLock(path).release()


def test_a_file_left_behind_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "here"}')
    FolderLock(tmp_path / ".lock").release()


def test_release_lets_others_in_and_can_be_repeated(tmp_path: Path) -> None:
    first = FolderLock(tmp_path / ".lock")
    with pytest.raises(CheckpointError):
        FolderLock(tmp_path / ".lock")
    first.release()
    first.release()
    FolderLock(tmp_path / ".lock").release()


def test_a_holder_that_wrote_nothing_is_still_refused(tmp_path: Path) -> None:
    first = FolderLock(tmp_path / ".lock")
    (tmp_path / ".lock").write_text("")
    with pytest.raises(CheckpointError, match="in use by another process"):
        FolderLock(tmp_path / ".lock")
    first.release()


def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    FolderLock(tmp_path / ".lock").release()
    assert "No locks available" in capsys.readouterr().err
