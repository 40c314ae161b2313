"""Write a log file for each process under RUN/logs, and show the first process on screen too.

Responsible for: where the output of each process goes, keeping the logs of earlier starts, and the agent's
own log. Not responsible for: what a failure means (failures.py).
"""

import logging
from collections.abc import Callable
from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from dovetail.launch.rank import ERROR_FILE


class RankLogs(LogsSpecs):
    """The files of this machine's processes: `rank-N.log` with both streams, `.rank-N.error.json` after a failure.

    N is the rank in the whole run, so that machines can share the folder. A log of an earlier start is kept as
    `rank-N.1.log`, `rank-N.2.log` and so on, the oldest first. The output of the machine's first process is also
    shown on screen. When the agent restarts all processes, it calls `before_restart` with the ranks and the number
    of the restart.
    """

    def __init__(self, folder: Path, *, before_restart: Callable[[dict[int, int], int], None]) -> None:
        super().__init__(str(folder))
        self.folder = folder
        self.ranks: dict[int, int] = {}
        """The rank in the whole run, by local rank; empty until the processes start."""
        self._before_restart = before_restart
        self._restarts = 0

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Prepare the files of a start or restart; the agent passes in the environment of each process."""
        # The agent's own count leaves out restarts that another machine caused.
        if self.ranks:
            self._restarts += 1
            self._before_restart(self.ranks, self._restarts)
        self.ranks = {local: int(environment["RANK"]) for local, environment in envs.items()}
        for local, rank in self.ranks.items():
            _put_aside(self.log(rank))
            self.error_file(rank).unlink(missing_ok=True)
            envs[local][ERROR_FILE] = str(self.error_file(rank))
        logs = {local: str(self.log(rank)) for local, rank in self.ranks.items()}
        return LogsDest(
            stdouts=logs,
            stderrs=dict.fromkeys(logs, ""),  # none, because stderr goes to stdout
            tee_stdouts={0: logs[0]},
            error_files={local: str(self.error_file(rank)) for local, rank in self.ranks.items()},
        )

    @property
    def root_log_dir(self) -> str:
        """The folder of the files."""
        return str(self.folder)

    def log(self, rank: int) -> Path:
        """Return the file with the output of a process."""
        return self.folder / f"rank-{rank}.log"

    def error_file(self, rank: int) -> Path:
        """Return the file to which a process writes its last error."""
        return self.folder / f".rank-{rank}.error.json"


def send_agent_log_to(file: Path) -> None:
    """Write the elastic agent's own messages to a file, because the screen is for what the user must know."""
    handler = logging.FileHandler(file, delay=True, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(handler)
    logger.propagate = False


def _put_aside(log: Path) -> None:
    if not log.exists():
        return
    number = 1
    while (kept := log.with_suffix(f".{number}.log")).exists():
        number += 1
    log.rename(kept)
