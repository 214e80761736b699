"""Delivery: planned micro-batches become batches, in loader processes or in this one, with the same result."""

import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from villa_ds.batch import Batch, Example, Reads, Sample
from villa_ds.data.collate import collate
from villa_ds.data.line import IntArray
from villa_ds.data.reader import ShardReader
from villa_ds.errors import VillaError
from villa_ds.rng import Stream

OPEN_FILES = 1 << 16  # a step of 1000 micro-batches a rank, with what is loaded ahead, needs a fifth of it


class Preparer(Protocol):
    """The data side of an objective (`villa_ds.objectives.base.Objective`)."""

    name: str
    reads: Reads
    rows: int
    negative_probability: float

    def prepare(self, sample: Sample, stream: Stream) -> Example:
        """Special tokens, masks and targets of one sample; all randomness from `stream`."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """An objective on a data set."""

    name: str  # of the data set; part of every random stream's key
    reader: ShardReader
    objective: Preparer


@dataclass(frozen=True, slots=True)
class Request:
    """A batch to be made: what is sent to a loader process."""

    source: int  # position in the maker's sources
    epoch: int
    pairs: IntArray  # [rows]
    negatives: IntArray  # [rows] group number, -1 for none


class BatchMaker(Dataset[Batch | VillaError]):
    """Reads, prepares and collates what a `Request` asks for: a function of the request, the sources and the seed."""

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self._sources = sources
        self._seed = seed

    def __getitem__(self, request: Request) -> Batch | VillaError:
        """The batch, or the error that the user can mend.

        It is returned because torch would wrap a raised one of another process into the text of a traceback.
        """
        try:
            return self.make(request)
        except VillaError as error:
            return error

    def make(self, request: Request) -> Batch:
        """Read, prepare and collate; each pair draws from a stream of its own."""
        source = self._sources[request.source]
        objective, path = source.objective, (self._seed, source.name, "prepare", source.objective.name, request.epoch)
        examples = [
            objective.prepare(source.reader.sample(pair, negative), Stream(*path, pair))
            for pair, negative in zip(request.pairs.tolist(), request.negatives.tolist(), strict=True)
        ]
        return collate(examples, objective.reads)


def deliver(
    maker: BatchMaker, requests: Iterable[Request], workers: int, prefetch: int, pin_memory: bool = False
) -> Generator[Batch, None, None]:
    """The batches of `requests`, in order.

    `workers` processes (0: none) are up to `prefetch` requests ahead each; they end with the iterator. `pin_memory`
    puts batches into page-locked memory. Raises the `VillaError` of a request when its batch would be due.
    """
    if workers:
        _allow_many_files()
    batches = DataLoader(
        maker,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_heed_the_trainer_only,
        generator=torch.Generator(),  # else torch draws its workers' seed from the generator that dropout uses
    )
    for made in batches:
        if isinstance(made, VillaError):
            raise made
        yield made


def _allow_many_files() -> None:
    """Raise the soft limit of open files: every tensor that came from a loader process holds one while it lives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _as_it_is(made: Any) -> Any:
    return made


def _heed_the_trainer_only(_: int) -> None:
    """Let a loader process outlive a scheduler's notice, which goes to every process of a job.

    The notice is meant for the trainer, which finishes its step and saves, and needs its loader processes for that.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    if trainer is not None and hasattr(signal, "sigwaitinfo"):  # macOS lacks it: torch's own handler stays
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_its_word, args=(trainer.pid,), daemon=True).start()


def _end_at_its_word(trainer: int) -> None:
    """End this process once `trainer` itself sends SIGTERM, as multiprocessing does to children left at its exit."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
