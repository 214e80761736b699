import os
import signal
import struct
from multiprocessing.connection import Connection

import pytest

from villa_ds.data import processes
from villa_ds.data.processes import in_order
from villa_ds.errors import DataError


def with_process(item: int) -> tuple[int, int, str | None]:
    return item * item, os.getpid(), os.environ.get("OMP_NUM_THREADS")


def killed(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def killed_in_the_middle(item: int) -> int:
    """Hand half of the result over and die, as one that the system kills for memory may."""
    if item == 3:

        def half(connection: Connection, message: bytes) -> None:
            os.write(connection.fileno(), struct.pack("!i", 2 * len(message)) + bytes(message))
            os.kill(os.getpid(), signal.SIGKILL)

        Connection._send_bytes = half
    return item


def refused(item: int) -> int:
    if item == 3:
        raise DataError("item 3: not for us")
    return item


def test_results_come_in_order_from_other_processes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = list(in_order(with_process, range(20), processes=2, chunk=3))
    assert [square for square, _, _ in found] == [item * item for item in range(20)]
    assert os.getpid() not in {process for _, process, _ in found}
    assert {threads for _, _, threads in found} == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_what_one_process_can_do_stays_here():
    assert {process for _, process, _ in in_order(with_process, range(3), processes=4, chunk=3)} == {os.getpid()}
    assert list(in_order(with_process, [], processes=2)) == []


def test_errors_of_the_work_and_killed_processes_end_it():
    with pytest.raises(DataError, match="item 3: not for us"):
        list(in_order(refused, range(8), processes=2))
    with pytest.raises(DataError, match="one of 2 processes was killed, perhaps for memory; give fewer processes"):
        list(in_order(killed, range(8), processes=2))


def test_one_killed_while_it_hands_its_result_over_is_noticed(monkeypatch):
    """The others hold the pipe open, and half a result is in it."""
    monkeypatch.setattr(processes, "_GRACE_S", 0.2)
    with pytest.raises(DataError, match="one of 2 processes was killed"):
        list(in_order(killed_in_the_middle, range(8), processes=2))


def interrupts(_: int) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_processes_leave_interrupts_to_the_first():
    assert all(in_order(interrupts, range(4), processes=2))
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
