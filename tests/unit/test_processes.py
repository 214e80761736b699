import os
import signal

import pytest

from villa_ds.data.processes import in_order
from villa_ds.errors import DataError


def with_process(item: int) -> tuple[int, int, str | None]:
    return item * item, os.getpid(), os.environ.get("OMP_NUM_THREADS")


def killed(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
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
