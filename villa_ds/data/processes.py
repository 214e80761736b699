"""Work spread over processes, its results in order."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from villa_ds.errors import DataError

T = TypeVar("T")
U = TypeVar("U")


def in_order(function: Callable[[T], U], items: Sequence[T], processes: int | None, chunk: int = 1) -> Iterator[U]:
    """`function` of each item, in order, by so many processes (default: one a CPU); by this one if 1 is enough.

    A process takes `chunk` items at a time. DataError if one is killed. The first exception of `function` ends all.
    """
    count = min(processes or cpus(), -(-len(items) // chunk))
    if count <= 1:
        yield from map(function, items)
        return
    # Not fork: a forked child of a process with threads can hang on a lock that one of them held.
    context = multiprocessing.get_context("spawn")
    with _one_thread_a_child(), ProcessPoolExecutor(count, mp_context=context) as pool:
        try:
            yield from pool.map(function, items, chunksize=chunk)
        except BrokenProcessPool:
            raise DataError(f"one of {count} processes was killed, perhaps for memory; give fewer processes") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def cpus() -> int:
    """CPUs that this process may use; a scheduler often grants fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _one_thread_a_child() -> Iterator[None]:
    """Processes started inside run numerical libraries on one thread: N processes of N threads thrash N CPUs."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
