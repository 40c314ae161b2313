"""Work is told from waiting by what the kernel counts: real calls, and by hand."""

import ctypes
import hashlib
import mmap
import sys
import threading
import time

import pytest

from dovetail.launch.activity import Effort, effort_of, has_worked

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
BEFORE = Effort(100.0, 20.0, 3000)


def after(seconds: float, *, processor_s: float = 0.0, faults: int = 0) -> Effort:
    return Effort(100.0 + seconds, 20.0 + processor_s, 3000 + faults)


def effort() -> Effort:
    found = effort_of(threading.get_native_id())
    assert found is not None
    return found


def test_a_processor_kept_busy_is_work_unless_the_process_may_wait_for_a_gpu() -> None:
    busy = after(10, processor_s=9.9)
    assert has_worked(BEFORE, busy, on_gpu=False)
    assert not has_worked(BEFORE, busy, on_gpu=True)


def test_new_pages_are_work_also_beside_a_gpu() -> None:
    reads = after(10, processor_s=0.1, faults=30_000)
    assert has_worked(BEFORE, reads, on_gpu=True)
    assert has_worked(BEFORE, reads, on_gpu=False)


def test_a_look_now_and_then_is_no_work() -> None:
    assert not has_worked(BEFORE, after(10, processor_s=0.1, faults=20), on_gpu=False)
    assert not has_worked(None, after(10, processor_s=9.9, faults=30_000), on_gpu=False)


@linux
def test_a_native_call_counts_as_time_on_a_processor() -> None:
    before, begin = effort(), time.thread_time()
    while time.thread_time() - begin < 0.5:
        hashlib.pbkdf2_hmac("sha256", b"word", b"salt", 100_000)
    used = effort().processor_s - before.processor_s
    assert abs(used - (time.thread_time() - begin)) < 0.1  # a tick is a hundredth, and may be a sample


@linux
def test_memory_that_is_filled_counts_as_pages() -> None:
    pages = 4096
    with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # one fault for each page
        whole = (ctypes.c_char * len(memory)).from_buffer(memory)
        before = effort()
        ctypes.memset(whole, 1, len(memory))
        assert effort().faults - before.faults >= pages
        del whole  # it would keep the memory


@linux
def test_another_thread_is_not_taken_for_this_one() -> None:
    asleep = threading.Event()
    thread = threading.Thread(target=asleep.wait)
    thread.start()
    assert thread.native_id is not None
    first = effort_of(thread.native_id)
    hashlib.pbkdf2_hmac("sha256", b"word", b"salt", 1_000_000)
    second = effort_of(thread.native_id)
    asleep.set()
    thread.join()
    assert not has_worked(first, second, on_gpu=False)


def test_a_thread_that_is_gone_has_done_nothing_that_is_known() -> None:
    assert effort_of(2**22 + 1) is None
