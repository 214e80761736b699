"""Loaders: one rank's stream of optimizer steps, and a held-out set in a fixed order."""

import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from villa_ds.batch import Batch
from villa_ds.config import DataConfig
from villa_ds.data.ahead import Ahead, shards_to_come
from villa_ds.data.delivery import BatchMaker, Preparer, Request, Source, deliver
from villa_ds.data.lanes import BatchPlan, Position, Row, describe_plan, draw_task
from villa_ds.data.manifest import Manifest
from villa_ds.data.order import require_order
from villa_ds.data.plan import DataPlan, MicroBatch, PlanSettings
from villa_ds.data.quarantine import Damage, DamagedError
from villa_ds.data.reader import ShardReader
from villa_ds.errors import CheckpointError

EVALUATION_SEED = 0  # held-out masks and mismatched images are the same in every run
EVALUATION_NAME = "evaluation"


@dataclass(frozen=True, slots=True)
class StepBatches:
    """What one rank gets for one optimizer step."""

    step: int  # from 1
    task: int  # position in the mix
    data: str
    objective: str
    batches: tuple[Batch, ...]  # of this rank's lanes, in order
    micro_batches: Row  # of all lanes, in order: the same on every rank; made when looked at
    wait_seconds: float  # how long the loader was waited for
    damage: tuple[Damage, ...] = ()  # that this rank met in making its batches


@dataclass(frozen=True, slots=True)
class _State:
    """Where the stream stands: steps done, and the next micro-batch of each data set."""

    step: int
    positions: Mapping[str, Position]


@dataclass(frozen=True, slots=True)
class _PlannedStep:
    task: int
    micro_batches: Row
    after: _State


class Loader:
    """One rank's stream of optimizer steps up to `total_steps`.

    `sets` maps names to manifests, `tasks` is the mix as (data set name, objective, weight). The objectives of a data
    set share one pass over its pairs. `position` is a `state()` to go on from. Which batches come is a function of
    these arguments but for `batch_plan.world`, `rank`, `data.workers` and `data.prefetch`, which only share the work.

    Raises ConfigError, DataError or DamageError where a set cannot be planned or read, CheckpointError if `position` is
    of other data sets. A damaged pair is no error: it is left out and told with the step. Iterating again goes on
    after the last step that was delivered.
    """

    def __init__(
        self,
        sets: Mapping[str, Manifest],
        tasks: Sequence[tuple[str, Preparer, float]],
        data: DataConfig,
        seed: int,
        batch_plan: BatchPlan,
        rank: int,
        total_steps: int,
        position: Mapping[str, Any] | None = None,
        *,
        pin_memory: bool = False,
    ) -> None:
        self._tasks, self._data, self._seed = tasks, data, seed
        self._batch_plan, self._rank, self._total_steps = batch_plan, rank, total_steps
        self._pin_memory = pin_memory
        self._sets = sets
        self._plans = {name: self._plan(name, sets[name]) for name in dict.fromkeys(name for name, _, _ in tasks)}
        readers = {
            name: ShardReader(sets[name], labels=any(task.reads_labels for data, task, _ in tasks if data == name))
            for name in self._plans
        }
        sources = [Source(name, readers[name], objective, data.max_text_length) for name, objective, _ in tasks]
        self._maker = BatchMaker(sources, seed)
        self._state = _State(0, dict.fromkeys(self._plans, Position())) if position is None else self._parse(position)
        self._running: Generator[StepBatches, None, None] | None = None

    def __iter__(self) -> Iterator[StepBatches]:
        self.close()
        self._running = self._deliver()
        return self._running

    def close(self) -> None:
        """End the loader processes. Happens by itself at the end of the stream and of the program."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def state(self) -> dict[str, Any]:
        """Where the stream stands after the last step that was delivered: plain integers, for a checkpoint."""
        positions = {name: [position.epoch, position.index] for name, position in self._state.positions.items()}
        return {"step": self._state.step, "sets": positions}

    def describe(self) -> list[str]:
        """One line for each data set: pairs, micro-batches, padding, read amplification of the present epoch."""
        return [
            describe_plan(plan, self._state.positions[name].epoch, self._batch_plan)
            for name, plan in self._plans.items()
        ]

    def _plan(self, name: str, manifest: Manifest) -> DataPlan:
        objectives = [objective for data, objective, _ in self._tasks if data == name]
        return _plan(
            manifest,
            PlanSettings(
                name=name,
                seed=self._seed,
                tokens=self._data.tokens,
                rows_multiple=self._data.rows_multiple,
                window=self._data.window,
                max_text_length=self._data.max_text_length,
                lanes=self._batch_plan.lanes,
                negative_probability=max(objective.negative_probability for objective in objectives),
                candidates=max(objective.candidates for objective in objectives),
                rules=tuple(objective.row_rule for objective in objectives),
            ),
        )

    def _parse(self, position: Mapping[str, Any]) -> _State:
        if set(position["sets"]) != set(self._plans):
            raise CheckpointError(
                f"the saved position is of the data sets {sorted(position['sets'])}, but the tasks use "
                f"{sorted(self._plans)}; restore the recipe's tasks, or start a new run"
            )
        step, positions = position["step"], {}
        for name, plan in self._plans.items():
            place = position["sets"][name]
            # Within the epoch, whose length the plan knows: a place beyond it would be no micro-batch at all.
            known = len(place) == 2 and 0 <= place[0] <= step * self._batch_plan.lanes
            if not known or not 0 <= place[1] < plan.epoch(place[0]).micro_batches:
                raise CheckpointError(
                    f"the saved position (epoch, micro-batch) {place[:2]} of the data set {name} is not one of it; "
                    "restore the data, or start a new run"
                )
            positions[name] = Position(*place)
        return _State(step, positions)

    def _plan_step(self, state: _State) -> _PlannedStep:
        task = draw_task(self._seed, state.step + 1, [weight for _, _, weight in self._tasks])
        name = self._tasks[task][0]
        row = Row(self._plans[name], self._batch_plan.lanes, state.positions[name])
        return _PlannedStep(task, row, _State(state.step + 1, {**state.positions, name: row.after}))

    def _requests(self, planned: deque[_PlannedStep]) -> Iterator[Request]:
        """This rank's requests from the present state on; each step is put on `planned` before its first request."""
        state = self._state
        while state.step < self._total_steps:
            step = self._plan_step(state)
            planned.append(step)
            for lane in self._batch_plan.lanes_of(self._rank):
                yield _request(step.task, self._tasks[step.task][1], step.micro_batches[lane])
            state = step.after

    def _deliver(self) -> Generator[StepBatches, None, None]:
        planned: deque[_PlannedStep] = deque()
        batches = deliver(
            self._maker,
            self._requests(planned),
            self._data.workers,
            self._data.prefetch,
            held=2 * self._batch_plan.lanes_per_rank,  # a step's, and those of the one before it
            batch_bytes=max(_batch_bytes(self._sets[name], self._data) for name in self._plans),
            pin_memory=self._pin_memory,
        )
        with Ahead({name: self._sets[name] for name in self._plans}, self._data) as ahead:
            while self._state.step < self._total_steps:
                ahead.want(
                    {
                        name: shards_to_come(plan, self._batch_plan, self._rank, self._state.positions[name])
                        for name, plan in self._plans.items()
                    }
                )
                started = time.perf_counter()
                taken = tuple(next(batches) for _ in range(self._batch_plan.lanes_per_rank))
                waited = time.perf_counter() - started
                step = planned.popleft()
                self._state = step.after
                name, objective, _ = self._tasks[step.task]
                yield StepBatches(
                    step.after.step, step.task, name, objective.name, tuple(made.batch for made in taken),
                    step.micro_batches, waited, tuple(case for made in taken for case in made.damage),
                )  # fmt: skip


class EvaluationLoader:
    """A held-out set in a fixed order, each pair exactly once, whatever the run's seed and the texts' length.

    Iterating yields (batch, whether it counts), and raises DamageError at the first damage. Every rank gets the same
    number; where the micro-batches do not divide evenly some ranks repeat one that does not count. `limit` bounds the
    micro-batches of all ranks together.
    """

    def __init__(
        self,
        manifest: Manifest,
        objective: Preparer,
        data: DataConfig,
        batch_plan: BatchPlan,
        rank: int,
        limit: int | None = None,
        *,
        pin_memory: bool = False,
    ) -> None:
        self._objective, self._data, self._pin_memory = objective, data, pin_memory
        self._world, self._rank = batch_plan.world, rank
        self._plan = _plan(
            manifest,
            PlanSettings(
                name=EVALUATION_NAME,
                seed=EVALUATION_SEED,
                tokens=data.tokens,
                rows_multiple=1,  # texts are longer than in training: rather few rows than a refusal
                window=data.window,
                max_text_length=None,
                negative_probability=objective.negative_probability,
                candidates=objective.candidates,
                rules=(objective.row_rule,),
            ),
        )
        longest = int(manifest.index["pair_length"].max())
        reader = ShardReader(manifest, labels=objective.reads_labels)
        self._maker = BatchMaker([Source(EVALUATION_NAME, reader, objective, longest)], EVALUATION_SEED)
        self._manifest = manifest
        count = self._plan.epoch(0).micro_batches
        self._count = count if limit is None else min(count, limit)

    def __len__(self) -> int:
        """Batches of each rank, those that do not count included."""
        return (self._count + self._world - 1) // self._world

    def __iter__(self) -> Iterator[tuple[Batch, bool]]:
        numbers = range(self._rank, len(self) * self._world, self._world)
        requests = map(self._request, numbers)
        batches = deliver(
            self._maker, requests, self._data.workers, self._data.prefetch,
            held=2, batch_bytes=_batch_bytes(self._manifest, self._data), pin_memory=self._pin_memory,
        )  # fmt: skip
        with Ahead({EVALUATION_NAME: self._manifest}, self._data) as ahead:
            for number in numbers:
                ahead.want({EVALUATION_NAME: self._shards_from(number)})
                made = next(batches)
                if made.damage:
                    raise DamagedError(made.damage[0], str(self._manifest.store))
                yield made.batch, number < self._count

    def _shards_from(self, number: int) -> Iterator[tuple[int, int]]:
        """(micro-batches until it is needed, shard) from micro-batch `number` on."""
        return ((at - number, shard) for at, shard in self._plan.shards_read(0, number, self._count))

    def _request(self, number: int) -> Request:
        return _request(0, self._objective, self._plan.micro_batch(0, min(number, self._count - 1)))


def _request(source: int, objective: Preparer, micro_batch: MicroBatch) -> Request:
    """What an objective reads of a micro-batch, which may be planned for others too."""
    return Request(
        source,
        micro_batch.epoch,
        micro_batch.pairs,
        micro_batch.negatives_for(objective.negative_probability),
        micro_batch.candidates[:, : objective.candidates],
    )


def _batch_bytes(manifest: Manifest, data: DataConfig) -> int:
    """The most that a batch takes if every token is a region, and all are masked."""
    return data.tokens * (2 * manifest.feature_width + 4 * manifest.detector_classes + 256)


def _plan(manifest: Manifest, settings: PlanSettings) -> DataPlan:
    require_order(manifest)
    return DataPlan(manifest.index, [shard.bytes for shard in manifest.shards], settings)
