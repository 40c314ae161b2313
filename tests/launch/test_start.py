"""The real command starts real processes; what is on screen, in the logs, and left behind."""

import os
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.launcher.api import LaunchConfig

from dovetail.errors import LaunchError
from dovetail.launch import start as module
from dovetail.launch.logs import RankLogs
from dovetail.launch.topology import Topology
from tests.launch.launched import expect_gone, launched
from tests.launch.ports import free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def test_every_process_does_the_work_and_the_first_is_shown(tmp_path: Path) -> None:
    with launched(tmp_path, "finish:0", "--num-gpus", "2") as command:
        code, out, err = command.ended()
    assert code == 0
    assert out.splitlines() == ["rank 0 of 2", f"talk to it: dovetail chat {tmp_path}"]
    assert err.splitlines() == [f"2 processes on this machine; the output of each is in {tmp_path / 'logs'}"]
    assert [command.log(rank) for rank in (0, 1)] == ["rank 0 of 2\n", "rank 1 of 2\n"]


def test_an_error_of_any_process_is_one_message_and_leads_to_no_restart(tmp_path: Path) -> None:
    with launched(tmp_path, "error:1", "--num-gpus", "2", "--max-restarts", "1") as command:
        pids = command.pids(2)
        code, _, err = command.ended()
    assert code == 2
    assert err.splitlines()[1:] == ["error: rank 1: pairs.jsonl line 7: not JSON", "hint: repair the line"]
    assert "DataError" in command.log(1)
    expect_gone(pids)


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_others_end_with_it(tmp_path: Path) -> None:
    with launched(tmp_path, "die:1", "--num-gpus", "2") as command:
        pids = command.pids(2)
        code, _, err = command.ended()
    assert code == 3
    assert err.splitlines()[1].startswith("error: rank 1 was killed by SIGKILL")
    expect_gone(pids)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_every_process(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with launched(tmp_path, "sleep:0", "--num-gpus", "2") as command:
        pids = command.pids(2)
        command.process.send_signal(number)
        assert command.ended()[0] == code
    expect_gone(pids)


def test_a_signal_lets_every_process_save_and_leads_to_no_restart(tmp_path: Path) -> None:
    with launched(tmp_path, "save:0", "--num-gpus", "2", "--max-restarts", "1") as command:
        pids = command.pids(2)
        command.process.send_signal(signal.SIGTERM)
        code, _, err = command.ended()
    assert code == 75
    assert [line for line in err.splitlines()[1:] if line] == [
        "SIGTERM: the run saves a checkpoint after this step and ends; a second one ends it now",
        "ppo: ended by SIGTERM after step 3 of 9, which is saved; the same command goes on from there",
    ]
    expect_gone(pids)


@pytest.mark.slow
def test_a_second_signal_ends_processes_that_are_still_at_it(tmp_path: Path) -> None:
    with launched(tmp_path, "refuse:0", "--num-gpus", "2") as command:
        pids = command.pids(2)
        assert command.process.stderr is not None
        command.process.send_signal(signal.SIGINT)
        while not command.process.stderr.readline().startswith("SIGINT: the run saves"):
            assert command.process.poll() is None
        command.process.send_signal(signal.SIGTERM)
        code, _, err = command.ended()
    assert code == 143
    assert "stopped by SIGTERM" in err
    expect_gone(pids)


@pytest.mark.slow
def test_a_terminal_that_closes_says_so_twice_and_every_process_saves(tmp_path: Path) -> None:
    with launched(tmp_path, "save late:0", "--num-gpus", "2") as command:
        command.pids(2)
        assert command.process.stderr is not None
        command.process.send_signal(signal.SIGHUP)
        while not command.process.stderr.readline().startswith("SIGHUP: the run saves"):
            assert command.process.poll() is None
        command.process.send_signal(signal.SIGHUP)
        assert command.ended()[0] == 75


@pytest.mark.slow
def test_a_run_that_ignores_the_end_of_its_terminal_goes_on(tmp_path: Path) -> None:
    with launched(tmp_path, "save:0", "--num-gpus", "2", ignores=[signal.SIGHUP]) as command:  # as nohup does
        for pid in [*command.pids(2), command.process.pid]:
            os.kill(pid, signal.SIGHUP)
        command.process.send_signal(signal.SIGTERM)  # handled after a SIGHUP that was not ignored
        code, _, err = command.ended()
    assert code == 75
    assert "SIGTERM: the run saves" in err


@pytest.mark.slow
def test_a_lost_process_is_started_again_with_all_others_and_each_start_has_a_preflight(
    tmp_path: Path,
) -> None:
    with launched(tmp_path, "die:1", "--num-gpus", "2", "--max-restarts", "1", PREFLIGHT="1") as command:
        code, out, err = command.ended()
    assert code == 0
    assert "restart 1: a process was lost" in err
    assert out.splitlines()[:2] == ["rank 0 of 2"] * 2
    assert (tmp_path / "logs" / "rank-1.1.log").read_text() == "rank 1 of 2\n"


@pytest.mark.slow
def test_a_mistake_of_ours_has_its_traceback_in_the_log_and_not_on_screen(tmp_path: Path) -> None:
    with launched(tmp_path, "bug:0", "--num-gpus", "2") as command:
        code, out, err = command.ended()
    assert code == 1
    assert err.splitlines()[1] == "error: rank 0: ZeroDivisionError: a mistake of ours"
    assert "Traceback" not in out + err
    assert "Traceback" in command.log(0)


@pytest.mark.slow
def test_a_process_that_leaves_without_a_word_gives_its_exit_code(tmp_path: Path) -> None:
    with launched(tmp_path, "leave:1", "--num-gpus", "2") as command:
        code, _, err = command.ended()
    assert code == 7
    assert "rank 1 ended with exit code 7: half a sentence" in err


@pytest.fixture
def port() -> str:
    return str(free_port())


@pytest.mark.slow
def test_two_machines_meet_and_a_lost_process_of_one_restarts_both(tmp_path: Path, port: str) -> None:
    where = ["--num-nodes", "2", "--master-addr", "127.0.0.1", "--master-port", port, "--max-restarts", "1"]
    with (
        launched(tmp_path, "die:1", *where, "--node-rank", "1") as second,
        launched(tmp_path, "die:1", *where, "--node-rank", "0") as first,
    ):
        results = [first.ended(), second.ended()]
    assert [code for code, _, _ in results] == [0, 0]
    assert {out.splitlines()[0] for _, out, _ in results} == {
        "rank 0: rank 0 of 2",
        "rank 1: rank 1 of 2",
    }
    assert "talk to it" in results[0][1]
    assert "talk to it" not in results[1][1]
    assert all((tmp_path / "logs" / f"rank-{rank}.1.log").exists() for rank in (0, 1))


@pytest.mark.slow
def test_a_lost_machine_that_comes_back_goes_on_with_the_others(tmp_path: Path, port: str) -> None:
    where = ["--num-nodes", "2", "--master-addr", "127.0.0.1", "--master-port", port, "--max-restarts", "2"]
    with (
        launched(tmp_path, "sleep:0", *where, "--node-rank", "0") as first,
        launched(tmp_path, "sleep:0", *where, "--node-rank", "1") as second,
    ):
        first.pids(2)
        second.process.kill()
        second.ended()
        (tmp_path / "pid-0").unlink()
        (tmp_path / "pid-1").unlink()
        with launched(tmp_path, "sleep:0", *where, "--node-rank", "1") as again:
            pids = again.pids(2)
            first.process.terminate()
            assert first.ended()[0] == 143
            code, _, err = again.ended()  # by itself: without node 0 there is nothing to wait for
    assert code == 3
    assert err.splitlines()[-2].startswith("error: node 0 of 2 has left 127.0.0.1:")
    expect_gone(pids)


@pytest.mark.slow
def test_two_machines_that_save_at_their_own_pace_both_say_so(tmp_path: Path, port: str) -> None:
    where = ["--num-nodes", "2", "--master-addr", "127.0.0.1", "--master-port", port, "--max-restarts", "1"]
    with (
        launched(tmp_path, "save:0", *where, "--node-rank", "0") as first,
        launched(tmp_path, "save late:0", *where, "--node-rank", "1") as second,
    ):
        first.pids(2)
        for command in (second, first):
            command.process.terminate()
        results = [first.ended(), second.ended()]
    assert [code for code, _, _ in results] == [75, 75], results


def test_a_second_launcher_leaves_the_logs_of_the_first_alone(tmp_path: Path) -> None:
    with launched(tmp_path, "sleep:0", "--num-gpus", "2") as first:
        first.pids(2)
        with launched(tmp_path, "finish:0", "--num-gpus", "2") as second:
            code, _, err = second.ended()
        assert first.process.poll() is None
    assert code == 2
    assert err.startswith(f"error: {tmp_path / 'logs'} is in use by process {first.process.pid} on ")
    assert not list((tmp_path / "logs").glob("rank-*.1.log"))


def test_a_machine_that_does_not_come_is_named_and_nothing_is_started(tmp_path: Path, port: str) -> None:
    where = ["--num-nodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", port]
    with launched(tmp_path, "finish:0", *where, "--rdzv-timeout", "1") as command:
        code, out, err = command.ended()
    assert code == 3
    assert err.startswith(f"error: node 1 of 2 did not arrive at 127.0.0.1:{port} within 1 s: node 0 is ")
    assert len(err.splitlines()) == 2
    assert out == ""
    assert not list(tmp_path.glob("pid-*"))


def test_a_signal_ends_a_machine_that_waits_for_the_others(tmp_path: Path, port: str) -> None:
    where = ["--num-nodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", port]
    with launched(tmp_path, "finish:0", *where) as command:
        store = TCPStore("127.0.0.1", int(port), is_master=False, wait_for_workers=False)
        PrefixStore(f"dovetail/{tmp_path.name}", store).wait(["node-0"])
        command.process.terminate()
        code, _, err = command.ended()
    assert code == 143
    assert err.startswith("\nstopped by SIGTERM")


def a_run(tmp_path: Path) -> tuple[LaunchConfig, list[str], RankLogs]:
    settings = LaunchConfig(min_nodes=2, max_nodes=2, nproc_per_node=1)
    return settings, ["true"], RankLogs(tmp_path, before_restart=lambda ranks, number: None)


def test_a_machine_too_many_is_told_that_the_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Meeting", lambda settings: SimpleNamespace(shutdown=lambda: True))
    monkeypatch.setattr(module, "_agent", lambda *_: SimpleNamespace(run=lambda: None))  # what torch's does
    with pytest.raises(LaunchError, match="the run has ended on the other machines") as caught:
        module._run(*a_run(tmp_path))
    assert caught.value.hint == "check whether two machines have the same --node-rank"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (dist.DistNetworkError("failed to recv"), "node 0 of 2 has left worker-0:29500"),
        (dist.DistStoreError("wait timeout"), "a node was lost and did not come back to worker-0:29500"),
    ],
)
def test_a_store_that_is_lost_while_machines_meet_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def lose(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "roll_call", lose)
    monkeypatch.setattr(module, "handle_stops", lambda handler: {})  # these tests have handlers of their own
    monkeypatch.setattr(os, "environ", dict(os.environ))
    there = Topology(num_gpus=1, num_nodes=2, node_rank=1, master_addr="worker-0")
    with pytest.raises(LaunchError, match=message):
        module.start(there, ["true"], tmp_path)


def test_a_port_in_use_is_one_message_and_nothing_is_started(tmp_path: Path, port: str) -> None:
    where = ["--num-nodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", port]
    with (
        socket.create_server(("127.0.0.1", int(port))),
        launched(tmp_path, "finish:0", *where) as command,
    ):
        code, out, err = command.ended()
    assert code == 3
    assert err.splitlines()[0] == f"error: port {port} of this machine is in use"
    assert err.splitlines()[1].startswith("hint: stop what uses it")
    assert (len(err.splitlines()), out) == (2, "")
    assert not list(tmp_path.glob("pid-*"))


def test_a_typo_in_the_hostfile_is_one_message_and_nothing_is_started(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("worker-0 slots=8\nworker-1 slot=8\n", encoding="utf-8")
    with launched(tmp_path, "finish:0", "--hostfile", str(hosts), "--node-rank", "0") as command:
        code, out, err = command.ended()
    assert code == 2
    assert err.splitlines() == [
        f"error: {hosts} line 2: 'worker-1 slot=8' is not a machine and its slots",
        "hint: write it as: worker-0 slots=8",
    ]
    assert out == ""
    assert not list(tmp_path.glob("pid-*"))
