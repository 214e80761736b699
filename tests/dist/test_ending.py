"""A rank ends with its own exit code, whatever the threads of torch.distributed still do."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.ranks import start_ranks

pytestmark = pytest.mark.dist
AT_ONCE = """
import torch, torch.distributed as distributed
from villa_ds.train.ending import end
distributed.init_process_group("gloo")
for _ in range(200):
    distributed.all_reduce(torch.ones(1000))
end(7)
"""
IN_ORDER = """
import atexit, threading, time, torch.distributed as distributed
from concurrent.futures import ThreadPoolExecutor
from villa_ds.train.ending import end
distributed.init_process_group("gloo")
pool = ThreadPoolExecutor(1)  # idle, and never shut down, as those of remote file systems
pool.submit(time.time).result()
threading.Thread(target=lambda: (time.sleep(0.5), print("the thread is done"))).start()
atexit.register(print, "exit functions run")
end(7)
"""


def ended(script: str) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of both ranks."""
    processes = start_ranks(2, "-W", "ignore", "-c", script)
    results = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *result) for process, result in zip(processes, results, strict=True)]


@pytest.mark.parametrize("_", range(3))
def test_threads_of_collectives_do_not_abort_it(_: int) -> None:
    """One of two ranks in five starts is aborted if the interpreter ends right after its last collective."""
    assert ended(AT_ONCE) == [(7, "", "")] * 2


def test_threads_are_waited_for_and_exit_functions_run() -> None:
    assert ended(IN_ORDER) == [(7, "the thread is done\nexit functions run\n", "")] * 2


def test_one_that_met_no_others_exits() -> None:
    command = "from villa_ds.train.ending import end; end(3)"
    repository = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", command], cwd=repository, check=False).returncode == 3
