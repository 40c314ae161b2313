"""Which of several dead processes died first, and what to say about it.

Responsible for: one error out of error files and exit codes. Not responsible for: writing error files
(rank.py), showing the message (cli/).
"""

import json
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.errors import ProcessFailed, RunInterrupted
from dovetail.launch.agent import END_NOW
from dovetail.launch.logs import RankLogs

# What gloo, NCCL and torch's stores say in a process whose peer has gone. Such an error follows from another.
_LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited|Socket (Timeout|closed)"
    r"|DistNetworkError|DistBackendError",
    re.IGNORECASE,
)
_PEER_HINT = "another process was lost; the log of the other ranks or nodes says why"


@dataclass(frozen=True, slots=True)
class Death:
    """How one process ended: `exit_code` as Python's subprocess gives it, and its error file, if it wrote one."""

    rank: int
    exit_code: int
    report: Mapping[str, Any] | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Smaller is nearer to the cause: killed from outside, then errors of its own, then lost peers and those
        that left without a word because another had failed, then those that the agent itself ended."""
        if self.exit_code < 0 and -self.exit_code not in (signal.SIGTERM, signal.SIGABRT, END_NOW):
            return 0, 0
        if self.report is None:
            return {-signal.SIGTERM: 3, -END_NOW: 3, 1: 2}.get(self.exit_code, 1), 0
        when = int(self.report["message"]["extraInfo"]["timestamp"])
        return (2 if self.lost_peer else 1), when

    @property
    def lost_peer(self) -> bool:
        """Whether the error says no more than that another process has gone."""
        return (
            self.report is not None
            and not self.report.get("known")
            and bool(_LOST_PEER.search(self.report["message"]["message"]))
        )


def read_report(file: Path) -> Mapping[str, Any] | None:
    """What a process wrote before it died; None if it wrote nothing, or died while writing."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def first_failure(exit_codes: Mapping[int, int], logs: RankLogs) -> ProcessFailed:
    """The failure to tell the user of, and every recorded traceback appended to the log of its process.

    exit_codes: by rank, of the processes of this machine that did not end well.
    """
    deaths = []
    for rank in logs.ranks.values():
        report = read_report(logs.error_file(rank))
        if report is not None:
            with logs.log(rank).open("a", encoding="utf-8") as log:
                log.write(report["message"]["extraInfo"]["py_callstack"])
        if report is not None or rank in exit_codes:
            deaths.append(Death(rank, exit_codes.get(rank, 1), report))
    return _describe(min(deaths, key=lambda death: death.order), logs)


def interruption(logs: RankLogs) -> RunInterrupted:
    """What rank 0 said when it had saved; from a machine where it is not, no more than that it did."""
    reports = (read_report(logs.error_file(rank)) for rank in logs.ranks.values())
    said = [r["message"]["message"] for r in reports if r and r.get("exit_code") == RunInterrupted.exit_code]
    return RunInterrupted(said[0] if said else "ended by a signal to one of the machines; the state is saved")


def _describe(death: Death, logs: RankLogs) -> ProcessFailed:
    log = logs.log(death.rank)
    if death.report is not None:
        message = f"rank {death.rank}: {death.report['message']['message']}"
        code = int(death.report.get("exit_code", 1))
        if death.report.get("known"):
            return ProcessFailed(message, hint=death.report.get("hint"), exit_code=code)
        if death.lost_peer:
            return ProcessFailed(message.splitlines()[0], hint=f"{_PEER_HINT}; its own: {log}", exit_code=3)
        return ProcessFailed(message, hint=f"the traceback is at the end of {log}", exit_code=code)
    if death.exit_code < 0:
        number = -death.exit_code
        cause = "; the kernel does so when memory runs out (dmesg tells)" if number == signal.SIGKILL else ""
        return ProcessFailed(
            f"rank {death.rank} was killed by {signal.Signals(number).name}{cause}",
            hint=f"the same command goes on from the last checkpoint; the last it said is in {log}",
            exit_code=3,
        )
    return ProcessFailed(
        f"rank {death.rank} ended with exit code {death.exit_code}{_last_line(log)}",
        hint=f"its output is in {log}",
        exit_code=death.exit_code,
    )


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    except OSError:
        return ""
    return f": {lines[-1]}" if lines else ""
