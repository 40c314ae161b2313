"""Find the process that failed first among several, and describe the failure.

Responsible for: making one error from error files and exit codes. Not responsible for: writing error files
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

# Errors of gloo, NCCL and torch's stores in a process whose peer is gone. Such an error follows from another one.
_LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited|Socket (Timeout|closed)"
    r"|DistNetworkError|DistBackendError",
    re.IGNORECASE,
)
_PEER_HINT = "another process was lost; the logs of the other ranks or nodes say why"


@dataclass(frozen=True, slots=True)
class Death:
    """The end of one process: `exit_code` as Python's subprocess gives it, and its error file, if it wrote one."""

    rank: int
    exit_code: int
    report: Mapping[str, Any] | None = None

    @property
    def order(self) -> tuple[int, int]:
        """The distance from the cause, for sorting.

        Processes killed from outside come first, then those with an error of their own, then those that lost a peer or
        left without a message because another had failed, then those that the agent itself ended.
        """
        if self.exit_code < 0 and -self.exit_code not in (signal.SIGTERM, signal.SIGABRT, END_NOW):
            return 0, 0
        if self.report is None:
            return {-signal.SIGTERM: 3, -END_NOW: 3, 1: 2}.get(self.exit_code, 1), 0
        when = int(self.report["message"]["extraInfo"]["timestamp"])
        return (2 if self.lost_peer else 1), when

    @property
    def lost_peer(self) -> bool:
        """Return whether the error says only that another process is gone."""
        return (
            self.report is not None
            and not self.report.get("known")
            and bool(_LOST_PEER.search(self.report["message"]["message"]))
        )


def read_report(file: Path) -> Mapping[str, Any] | None:
    """Read what a process wrote before it died; None if it wrote nothing or died while writing."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def first_failure(exit_codes: Mapping[int, int], logs: RankLogs) -> ProcessFailed:
    """Return the failure to report, and append every recorded traceback to the log of its process.

    exit_codes: the exit codes, by rank, of the processes of this machine that failed.
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
    """Return what rank 0 said when it had saved; on a machine without rank 0, only that the state is saved."""
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
            return ProcessFailed(
                message.splitlines()[0], hint=f"{_PEER_HINT}; the log of this rank: {log}", exit_code=3
            )
        return ProcessFailed(message, hint=f"the traceback is at the end of {log}", exit_code=code)
    if death.exit_code < 0:
        number = -death.exit_code
        cause = "; the kernel does so when memory runs out (see dmesg)" if number == signal.SIGKILL else ""
        return ProcessFailed(
            f"rank {death.rank} was killed by {signal.Signals(number).name}{cause}",
            hint=f"the same command continues from the last checkpoint; the last output is in {log}",
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
