"""Delivery: planned micro-batches become batches, in loader processes or in this one, with the same result."""

import dataclasses
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from villa_ds.batch import Batch, Example, Reads, Sample
from villa_ds.data.buffers import Buffers, Place
from villa_ds.data.collate import Empty, collate
from villa_ds.data.line import IntArray
from villa_ds.data.processes import end_with_parent, fork_server
from villa_ds.data.quarantine import Damage, DamagedError
from villa_ds.data.reader import ShardReader
from villa_ds.data.sizes import RowRule, longest_texts, sizes_of
from villa_ds.errors import DataError, VillaError
from villa_ds.rng import Stream

OPEN_FILES = 1 << 16  # a step of 1000 micro-batches a rank, with what is loaded ahead, needs a fifth of it
_DRAWS = 64  # candidates to stand in for a row; all of them are damaged or too long only where nearly all the set is


class Preparer(Protocol):
    """The data side of an objective (`villa_ds.objectives.base.Objective`)."""

    name: str
    reads: Reads
    negative_probability: float
    candidates: int
    reads_labels: bool

    @property
    def row_rule(self) -> RowRule:
        """What room a sample takes, from the index alone."""
        ...

    def prepare(self, sample: Sample, stream: Stream) -> Example:
        """Special tokens, masks and targets of one sample; all randomness from `stream`."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """An objective on a data set."""

    name: str  # of the data set; part of every random stream's key
    reader: ShardReader
    objective: Preparer
    longest_text: int  # word pieces; longer texts are never delivered


@dataclass(frozen=True, slots=True)
class Request:
    """A batch to be made: what is sent to a loader process."""

    source: int  # position in the maker's sources
    epoch: int
    pairs: IntArray  # [rows]
    negatives: IntArray  # [rows] group number, -1 for none
    candidates: IntArray  # [rows, candidates] group numbers


@dataclass(frozen=True, slots=True)
class Delivered:
    """A batch, and the damage that was met in making it."""

    batch: Batch
    damage: tuple[Damage, ...] = ()

    def pin_memory(self) -> "Delivered":
        """The same in page-locked memory (torch's DataLoader calls this)."""
        return Delivered(self.batch.pin_memory(), self.damage)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A batch whose tensors lie in a buffer, as `villa_ds.data.buffers.Place`, and the damage."""

    batch: Batch
    damage: tuple[Damage, ...]
    buffers: Buffers
    number: int

    def open(self) -> Delivered:
        """The batch with its tensors."""
        return Delivered(self.batch.map(Place, self.buffers.lease(self.number).tensor), self.damage)

    def pin_memory(self) -> Delivered:
        """As `Delivered.pin_memory`; the buffer is free again at once."""
        return self.open().pin_memory()


class BatchMaker:
    """Reads, prepares and collates what a `Request` asks for: a function of the request, the sources and the seed.

    A pair that is damaged, or whose mismatched image is, has no row in the batch. Where none is left, others of the set
    stand in, so that every rank has something to compute (docs/data-order.md).
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self._sources = sources
        self._seed = seed

    def make(self, request: Request, empty: Empty = np.empty) -> Delivered:
        """Read, prepare and collate, into arrays of `empty`; each pair draws from a stream of its own."""
        source = self._sources[request.source]
        damage: list[Damage] = []
        source.reader.fetch(_groups_of(source, request))
        planned = [
            (pair, _read(source.reader, pair, negative, candidates, damage))
            for pair, negative, candidates in zip(
                request.pairs.tolist(), request.negatives.tolist(), request.candidates.tolist(), strict=True
            )
        ]
        samples = [(pair, sample) for pair, sample in planned if sample is not None]
        samples = samples or self._stand_ins(source, request, damage)
        objective, path = source.objective, (self._seed, source.name, "prepare", source.objective.name, request.epoch)
        examples = [objective.prepare(sample, Stream(*path, pair)) for pair, sample in samples]
        return Delivered(collate(examples, objective.reads, empty), tuple(dict.fromkeys(damage)))

    def _stand_ins(self, source: Source, request: Request, damage: list[Damage]) -> list[tuple[int, Sample]]:
        """Pairs and samples for a micro-batch that has no sound pair: drawn from the whole set, for each row its own.

        They take no more room than what they replace, but for the first. DamagedError if next to nothing is sound.
        """
        index, rule, longest = source.reader.manifest.index, source.objective.row_rule, 0
        found: list[tuple[int, Sample]] = []
        lengths = _planned(source, request.pairs, request.negatives, request.candidates)
        for pair, negative, ranked in zip(
            request.pairs.tolist(), request.negatives.tolist(), request.candidates, strict=True
        ):
            stream = Stream(self._seed, source.name, "stand-in", request.epoch, pair)
            drawn = stream.integers(_DRAWS, len(index["pair_group"]))
            others = stream.integers(_DRAWS, len(index["group_shard"])) if negative >= 0 else np.full(_DRAWS, -1)
            allowed = rule.own_text(sizes_of(index, drawn)) <= source.longest_text
            allowed &= (others != index["pair_group"][drawn]) & ~np.isin(index["pair_group"][drawn], ranked)
            for candidate, other in zip(drawn[allowed].tolist(), others[allowed].tolist(), strict=True):
                sample = _read(source.reader, candidate, other, ranked.tolist(), damage)
                if sample is not None:
                    break
            else:
                raise DamagedError(damage[0], str(source.reader.manifest.store))
            length = _planned(source, np.array([candidate]), np.array([other]), ranked[None]).max()
            longest = max(longest, int(length))
            if found and longest * (len(found) + 1) > lengths.max() * len(lengths):
                break
            found.append((candidate, sample))
        return found


def _groups_of(source: Source, request: Request) -> list[int]:
    """The groups that a request reads, each once."""
    own = source.reader.manifest.index["pair_group"][request.pairs]
    others = np.concatenate([request.negatives, request.candidates.ravel()])
    return list(dict.fromkeys([*own.tolist(), *others[others >= 0].tolist()]))


def _read(
    reader: ShardReader, pair: int, negative: int, candidates: Sequence[int], damage: list[Damage]
) -> Sample | None:
    """The sample, or None and what is wrong in `damage`. In place of damaged candidates sound ones come twice."""
    sound = []
    try:
        sample = reader.sample(pair, negative)
    except DamagedError as error:
        damage.append(error.damage)
        return None
    if not candidates:
        return sample
    for group in candidates:
        try:
            sound.append(reader.mismatched(group))
        except DamagedError as error:
            damage.append(error.damage)
    if not sound:
        return None
    return dataclasses.replace(sample, candidates=[sound[place % len(sound)] for place in range(len(candidates))])


def _planned(source: Source, pairs: IntArray, negatives: IntArray, candidates: IntArray) -> IntArray:
    """[rows] tokens of each pair's rows with the mismatched groups that it is read with."""
    index = source.reader.manifest.index
    sizes, others = sizes_of(index, pairs), np.concatenate([negatives[:, None], candidates], axis=1)
    if (others >= 0).any():
        regions = np.where(others < 0, 0, index["group_regions"][others]).max(1)
        texts = np.where(others < 0, 0, longest_texts(index, None)[others]).max(1)
        sizes = sizes.with_others(regions, texts)
    return source.objective.row_rule.planned_tokens(sizes)


class _Filler(Dataset[Delivered | _Placed | VillaError]):
    """What runs in a loader process: batches made into buffers."""

    def __init__(self, maker: BatchMaker, buffers: Buffers) -> None:
        self._maker, self._buffers = maker, buffers

    def __getitem__(self, request: Request) -> Delivered | _Placed | VillaError:
        """The batch, or the error that the user can mend.

        It is returned because torch would wrap a raised one of another process into the text of a traceback.
        """
        process = get_worker_info()
        filling = self._buffers.take(0 if process is None else process.id)
        try:
            made = self._maker.make(request, np.empty if filling is None else filling.empty)
        except VillaError as error:
            if filling is not None:
                self._buffers.drop(filling.number)
            return error
        if filling is None:
            return made
        return _Placed(made.batch.map(torch.Tensor, filling.place), made.damage, self._buffers, filling.number)


def deliver(
    maker: BatchMaker,
    requests: Iterable[Request],
    workers: int,
    prefetch: int,
    *,
    held: int,
    batch_bytes: int,
    pin_memory: bool = False,
) -> Generator[Delivered, None, None]:
    """The batches of `requests`, in order.

    `workers` processes (0: none), which start at once, are up to `prefetch` requests ahead each; they end with the
    iterator. `pin_memory` puts batches into page-locked memory. Raises the `VillaError` of a request when its batch
    would be due. The memory of a batch is used again when its tensors are gone; `held`: how many the caller has at a
    time, `batch_bytes`: the most that one is expected to take. More and larger ones are slower, no error.
    """
    count = (prefetch + 1 if workers else 0) + -(-held // max(workers, 1))
    filler = _Filler(maker, Buffers(workers, count, batch_bytes))
    if workers:
        _allow_many_files()
    batches = DataLoader(
        filler,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_heed_the_trainer_only,
        multiprocessing_context=fork_server() if workers else None,
        generator=torch.Generator(),  # else torch draws its workers' seed from the generator that dropout uses
    )
    return _sound(iter(batches))  # not lazily: processes begin to load at once


def _sound(batches: Iterator[Delivered | _Placed | VillaError]) -> Generator[Delivered, None, None]:
    try:
        for made in batches:
            if isinstance(made, VillaError):
                raise made
            yield made.open() if isinstance(made, _Placed) else made
            del made  # or its memory would be in use while the next is waited for
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # torch has no type for it
            raise
        mend = "give fewer data.workers or less data.prefetch, and start again to go on"
        raise DataError(f"a loader process was killed, perhaps for memory; {mend}") from None


def _allow_many_files() -> None:
    """Raise the soft limit of open files: every tensor that came from a loader process holds one while it lives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _as_it_is(made: Any) -> Any:
    return made


def _heed_the_trainer_only(_: int) -> None:
    """Let a loader process outlive a scheduler's notice, which goes to every process of a job, but not the trainer.

    The notice is meant for the trainer, which finishes its step and saves, and needs its loader processes for that;
    they were started with `NOTICES` blocked.
    """
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        end_with_parent()
        if hasattr(signal, "sigwaitinfo"):
            threading.Thread(target=_end_at_its_word, args=(trainer.pid,), daemon=True).start()
        else:  # macOS
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_at_its_word(trainer: int) -> None:
    """End this process once `trainer` itself sends SIGTERM, as multiprocessing does to children left at its exit."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
