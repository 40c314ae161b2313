"""Extend torch's elastic agent: a signal lets the processes save, and a failure ends all of them at once.

Responsible for: the signals that processes get when the run is to end and when one fails, and for no restart after
a signal or after a run that saved its state. Not responsible for: the agent's settings, the meaning of its result
(start.py).
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
"""Signal that ends a process at once, even one that waits for a GPU; SIGTERM would let it save."""
SAVED = RunInterrupted.exit_code
_OTHERS_SAVE_S = 60
"""Seconds for which a machine that has saved waits for the others: the rendezvous must last until they have saved."""
_LASTING = DovetailError.exit_code
"""Exit code of errors that would happen again after a restart."""


class Agent(LocalElasticAgent):
    """The agent that starts the processes of this machine, watches them, and restarts them when one is lost."""

    asked: signal.Signals | None = None
    """The signal that asked for the end of the run."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        heard = [n for n in (*STOPS, signal.SIGQUIT) if signal.getsignal(n) is not signal.SIG_IGN]
        # Torch handles these signals itself after each start; by default it would also handle those that are ignored.
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
        if SAVED in codes:  # torch waits for the other machines only if all processes ended with 0
            self._exit_barrier_timeout = _OTHERS_SAVE_S
            self._exit_barrier()  # type: ignore[no-untyped-call]
        return result

    def _stop_workers(self, worker_group: WorkerGroup, *more: Any, **named: Any) -> None:
        self._end_now()
        super()._stop_workers(worker_group, *more, **named)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        """Send the first signal to the processes as SIGTERM and go on watching them; let the second one kill them.

        A second SIGHUP does nothing: when a terminal closes, the kernel and the shell both send one.
        """
        if self.asked and number == signal.SIGHUP:
            return
        is_first, self.asked = self.asked is None, signal.Signals(number)
        if not is_first or self._worker_group.state is not WorkerState.HEALTHY:
            raise SignalException(f"{self.asked.name} ends the run", signal.SIGKILL)
        for process in self._processes():
            process.send_signal(signal.SIGTERM)
        text = f"\n{self.asked.name}: the run saves a checkpoint after this step and ends; a second one ends it now\n"
        if sys.__stderr__:
            with suppress(OSError):  # the terminal may be gone
                # without locks, which the main thread may hold at this moment
                os.write(sys.__stderr__.fileno(), text.encode())

    def _end_now(self) -> None:
        for process in self._processes():
            process.send_signal(END_NOW)

    def _processes(self) -> Iterator[Popen[bytes]]:
        """Yield the processes that were started last; a signal to one that has ended does nothing."""
        if isinstance(self._pcontext, SubprocessContext):
            for handler in self._pcontext.subprocess_handlers.values():
                yield handler.proc


def _code(failure: ProcessFailure) -> int:
    """Return the exit code in a process's error file, because it may be killed after writing it; else its own."""
    return int(failure.error_file_data.get("exit_code", failure.exitcode))
