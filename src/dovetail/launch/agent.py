"""Torch's elastic agent, with two habits of its own: a signal lets the processes save, a failure ends them at once.

Responsible for: what processes are told on a signal and on a failure, and that neither a signal nor a run that saved
itself leads to a restart. Not responsible for: its settings and what its end means (start.py).
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from subprocess import Popen
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from dovetail.errors import DovetailError, RunInterrupted
from dovetail.launch.early_signals import STOPS

END_NOW = signal.SIGUSR2
"""Ends a process that does not expect it, also one that waits for a GPU; SIGTERM would let it save."""
SAVED = RunInterrupted.exit_code
_OTHERS_SAVE_S = 60
"""Seconds for which a machine whose processes have saved waits for the others': the meeting place must outlive them."""
_LASTING = DovetailError.exit_code
"""Of errors that another start would meet again."""


class Agent(LocalElasticAgent):
    """Starts the processes of this machine, watches them, and starts them anew when one was lost."""

    asked: signal.Signals | None = None
    """The signal that asked for the end of the run."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        heard = [n for n in (*STOPS, signal.SIGQUIT) if signal.getsignal(n) is not signal.SIG_IGN]
        # Torch takes these for itself at each start; left to itself, also those that are ignored.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in heard)
        ids: dict[int, Any] = super()._start_workers(worker_group)
        for number in set(heard).intersection(STOPS):
            signal.signal(number, self._pass_on)
        return ids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if any(process.poll() not in (None, 0, SAVED) for process in self._processes()):
            self._end_now()
        result: RunResult = super()._monitor_workers(worker_group)
        codes = {_code(failure) for failure in result.failures.values()}
        if self.asked or codes & {SAVED, _LASTING}:
            self._remaining_restarts = 0
        if SAVED in codes:  # torch waits for the other machines only where all ended with 0
            self._exit_barrier_timeout = _OTHERS_SAVE_S
            self._exit_barrier()  # type: ignore[no-untyped-call]
        return result

    def _stop_workers(self, worker_group: WorkerGroup, *more: Any, **named: Any) -> None:
        self._end_now()
        super()._stop_workers(worker_group, *more, **named)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        """The first signal goes to the processes as SIGTERM, and they are watched on; the second kills them.

        Not so a second SIGHUP: of one terminal that closes both the kernel and the shell tell.
        """
        if self.asked and number == signal.SIGHUP:
            return
        is_first, self.asked = self.asked is None, signal.Signals(number)
        if not is_first or self._worker_group.state is not WorkerState.HEALTHY:
            raise SignalException(f"{self.asked.name} ends the run", signal.SIGKILL)
        for process in self._processes():
            process.send_signal(signal.SIGTERM)
        text = f"\n{self.asked.name}: the run saves a checkpoint after this step and ends; once more ends it now\n"
        if sys.__stderr__:
            with suppress(OSError):  # the terminal may have gone
                # without locks, which the main thread may hold at this moment
                os.write(sys.__stderr__.fileno(), text.encode())

    def _end_now(self) -> None:
        for process in self._processes():
            process.send_signal(END_NOW)

    def _processes(self) -> Iterator[Popen[bytes]]:
        """Those that were started last; a signal to one that has ended goes nowhere."""
        if isinstance(self._pcontext, SubprocessContext):
            for handler in self._pcontext.subprocess_handlers.values():
                yield handler.proc


def _code(failure: ProcessFailure) -> int:
    """With which a process ended, or would have: it may be killed on its way out, its error told."""
    return int(failure.error_file_data.get("exit_code", failure.exitcode))
