"""Buffers of batches: used again when their tensors are gone, and not before."""

import os
import pickle
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.preparers import Plain
from tests.shards import make_shards
from villa_ds.config import DataConfig
from villa_ds.data import loader as loader_module
from villa_ds.data.buffers import Buffers, Place
from villa_ds.data.digest import digest
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.loader import Loader
from villa_ds.data.processes import fork_server


def fill(buffers: Buffers, value: int) -> tuple[int, Place]:
    filling = buffers.take(0)
    assert filling is not None
    array = filling.empty((3, 4), np.dtype(np.float32))
    array[...] = value
    place = filling.place(torch.from_numpy(array))
    assert isinstance(place, Place)
    return filling.number, place


def test_a_buffer_is_free_when_the_last_tensor_of_it_is_gone() -> None:
    buffers = Buffers(workers=0, count=1, size=4096)
    number, place = fill(buffers, 7)
    assert buffers.take(0) is None
    tensor = buffers.lease(number).tensor(place)
    part = tensor[1:]
    del tensor
    assert buffers.take(0) is None
    assert part.tolist() == [[7.0] * 4] * 2
    del part
    assert fill(buffers, 8)[0] == number


def test_tensors_from_elsewhere_are_copied_in_and_what_has_no_room_stays() -> None:
    filling = Buffers(workers=0, count=1, size=256).take(0)
    assert filling is not None
    assert filling.empty((3,), np.dtype(np.int64)).tobytes() == bytes(24)
    assert filling.place(torch.arange(4)) == Place(64, (4,), "<i8")
    large = torch.zeros(100)
    assert filling.place(large) is large
    assert filling.empty((100,), np.dtype(np.float32)).flags.owndata
    nothing = filling.place(torch.zeros(0, 5))
    assert isinstance(nothing, Place)
    assert (nothing.shape, nothing.dtype) == ((0, 5), "<f4")


def test_each_process_has_buffers_of_its_own() -> None:
    buffers = Buffers(workers=2, count=2, size=64)
    taken = [buffers.take(worker) for worker in (1, 0, 1, 1, 0, 0)]
    assert [filling and filling.number for filling in taken] == [2, 0, 3, None, 1, None]


def test_a_pickle_finds_the_same_buffers_and_none_in_another_process() -> None:
    buffers = Buffers(workers=0, count=1, size=64)
    data = pickle.dumps(buffers)
    assert pickle.loads(data) is buffers  # noqa: S301
    del buffers
    assert pickle.loads(data).take(0) is None  # noqa: S301


def fill_in_another_process(buffers: Buffers, results: "SimpleQueue[tuple[int, Place, bool]]") -> None:
    results.put((*fill(buffers, 7), buffers.take(0) is None))


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no anonymous files here: other processes have no buffers")
def test_a_process_that_was_started_with_buffers_fills_them() -> None:
    context, buffers = fork_server(), Buffers(workers=1, count=1, size=4096)
    results: SimpleQueue[tuple[int, Place, bool]] = context.SimpleQueue()
    process = context.Process(target=fill_in_another_process, args=(buffers, results))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    number, place, full = results.get()
    assert full
    assert buffers.take(0) is None
    tensor = buffers.lease(number).tensor(place)
    assert tensor.tolist() == [[7.0] * 4] * 3
    del tensor
    assert fill(buffers, 8)[0] == number


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_bytes", [1 << 20, 1000])
def test_batches_that_are_kept_are_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, batch_bytes: int
) -> None:
    sets = {"set": make_shards(tmp_path, groups=12, shards=2)}
    data = DataConfig(tokens=60, rows_multiple=1, lanes=2, window=16, workers=workers, prefetch=1)
    monkeypatch.setattr(loader_module, "_batch_bytes", lambda manifest, data: batch_bytes)

    def steps() -> Loader:
        return Loader(sets, [("set", Plain("plain"), 1.0)], data, 3, BatchPlan(2), 0, 12)

    one_by_one = [[digest(batch) for batch in step.batches] for step in steps()]
    kept = list(steps())
    assert [[digest(batch) for batch in step.batches] for step in kept] == one_by_one
    assert len({value for step in one_by_one for value in step}) == 24
