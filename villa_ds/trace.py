"""`villa-ds trace`: what the real loaders of a given number of ranks and workers deliver."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from villa_ds.config import Recipe
from villa_ds.data.digest import digest
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.loader import Loader
from villa_ds.data.quarantine import Quarantine
from villa_ds.train.session import open_data


def trace(recipe: Recipe, steps: int, world: int, workers: int) -> Iterator[dict[str, Any]]:
    """Run the loaders of `world` ranks with `workers` processes each in this process for `steps` optimizer steps.

    Yields one JSON-able mapping for each global micro-batch, by step and lane. It says what was delivered and not to
    which rank, so two traces of a recipe are equal if and only if the same batches arrive in the same order.
    `quarantined` counts the damaged pairs met up to the step's end; DamageError where a run would stop for them.
    """
    plan = BatchPlan(recipe.data.lanes, world)
    settings = dataclasses.replace(recipe.data, workers=workers)
    data = open_data(recipe)
    tasks = [(task.data, objective, task.weight) for task, objective in zip(recipe.tasks, data.objectives, strict=True)]
    loaders = [Loader(data.sets, tasks, settings, recipe.seed, plan, rank, steps) for rank in range(world)]
    quarantine = Quarantine(data.sets, recipe.data.damage_budget)
    for ranks in zip(*loaders, strict=True):
        quarantine.add(ranks[0].step, ranks[0].data, [damage for got in ranks for damage in got.damage])
        quarantine.check()
        for rank, got in enumerate(ranks):
            for lane, batch in zip(plan.lanes_of(rank), got.batches, strict=True):
                micro_batch = got.micro_batches[lane]
                yield {
                    "step": got.step,
                    "lane": lane,
                    "data": got.data,
                    "objective": got.objective,
                    "epoch": micro_batch.epoch,
                    "index": micro_batch.index,
                    "ids": list(batch.ids),
                    "digest": digest(batch),
                    "quarantined": quarantine.pairs,
                }
