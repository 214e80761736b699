"""Work spread over processes, its results in order, and where a run's loader processes come from.

Never by a plain fork: a run has threads that are not Python's (gloo's, NCCL's, those of torch), and a child that is
forked while one of them holds a lock waits for it for ever. CPython before 3.12 has such a lock of its own
(its issue 112275), which a thread takes when it drops a tensor.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotYetError  # not the built-in one before Python 3.11
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from villa_ds.errors import DataError

T = TypeVar("T")
U = TypeVar("U")
_GRACE_S = 2.0  # for the pool to notice by itself that a process was killed
_AHEAD = 2  # chunks a process: one at work, one waiting; more only takes memory
# What a scheduler or a terminal sends to every process of a job, and is meant for the first one.
NOTICES = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PRELOADED = ["villa_ds.data.delivery", "villa_ds.objectives"]  # once, by the fork server
_function: Callable[[Any], Any] | None = None  # of a worker process


def in_order(function: Callable[[T], U], items: Sequence[T], processes: int | None, chunk: int = 1) -> Iterator[U]:
    """`function` of each item, in order, by so many processes (default: one a CPU); by this one if 1 is enough.

    A process gets `function` once and takes `chunk` items at a time, and no more than a few chunks are under way, so
    what waits to be taken is bounded. DataError if a process is killed. The first exception of `function` ends all.
    Processes leave SIGINT to this one and end with it, however it ends.
    """
    count = min(processes or cpus(), -(-len(items) // chunk))
    if count <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[list[U]]] = deque()
    with (
        _one_thread_a_child(),
        ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(function,)) as pool,
    ):
        try:
            others = set(multiprocessing.active_children())
            workers: set[BaseProcess] = set()
            for start in range(0, len(items), chunk):
                # not a slice: items may be made one by one
                part = [items[place] for place in range(start, min(start + chunk, len(items)))]
                with _held_back({signal.SIGINT}):  # a call may start a process
                    waiting.append(pool.submit(_work, part))
                workers |= set(multiprocessing.active_children()) - others
                if len(waiting) == _AHEAD * count:
                    yield from _result(pool, waiting.popleft(), workers)
            while waiting:
                yield from _result(pool, waiting.popleft(), workers)
        except BrokenProcessPool:
            raise DataError(f"one of {count} processes was killed, perhaps for memory; give fewer processes") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _result(pool: ProcessPoolExecutor, future: "Future[list[U]]", workers: set[BaseProcess]) -> list[U]:
    """What a future comes to, or BrokenProcessPool.

    A process that is killed while it hands its result over leaves half of it in the pipe, and the pool waits for the
    rest for as long as another process, or this one, holds the pipe open for writing.
    """
    while True:
        try:
            return future.result(timeout=_GRACE_S)
        except NotYetError:
            if future.done():
                raise
            if not all(worker.is_alive() for worker in workers):
                for worker in workers:
                    worker.kill()
                pool._result_queue._writer.close()  # type: ignore[attr-defined]  # ours: else there is no end to read
                workers = set()


def fork_server() -> ForkServerContext:
    """A context whose processes are forked by a server, which this process starts unless it has one; returns at once.

    The server has no threads, has imported what its processes need, leaves `NOTICES` to this process and ends with it.
    Its processes have `NOTICES` blocked.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with _held_back(NOTICES):  # which a process inherits for good
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _held_back(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Processes started inside never see these, not even before they have begun; here they come a moment later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        resource_tracker.ensure_running()  # which starts with the first process, and lets SIGINT and SIGTERM through
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(function: Callable[[Any], Any]) -> None:
    global _function  # noqa: PLW0603  # a process has no other place that outlives a call
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal it comes to all; the first process decides
    end_with_parent()


def end_with_parent() -> None:
    """Have a thread see to it that this process ends with its parent: else `kill -9` leaves it waiting for ever."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(items: Sequence[Any]) -> list[Any]:
    if _function is None:
        raise RuntimeError("a worker process was not begun")
    return [_function(item) for item in items]


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
