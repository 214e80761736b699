"""Held-out losses and metrics per task, beside what a trivial answer would score."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from villa_ds.batch import Batch, LossOutput
from villa_ds.data.loader import EvaluationLoader
from villa_ds.objectives.base import Objective
from villa_ds.train.metrics import SumTable
from villa_ds.train.torch_engine import Engine

MAJORITY = "majority_baseline"
POLL_EVERY = 8  # micro-batches between questions whether to stop: a preempted job has seconds

Observer = Callable[[LossOutput, Batch], None]


@torch.no_grad()
def evaluate(
    engine: Engine,
    objective: Objective,
    loader: EvaluationLoader,
    observe: Observer | None = None,
    poll: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Means over the loader's micro-batches, over all ranks; the module is left in training mode.

    `observe` is called with every output that counts, `poll` now and then by all ranks together; it may raise.

    `majority_baseline` is the accuracy of always answering the evaluated set's commonest class: the best that ignores
    the input can do, so a trained model must beat it.
    """
    sums = SumTable()
    classes: Tensor | None = None
    engine.module.eval()
    for number, (batch, counts) in enumerate(loader):
        if poll is not None and number % POLL_EVERY == 0:
            poll()
        on_device = batch.to(engine.device, non_blocking=True)
        output = engine.probe(on_device, objective.name, None)
        weight = float(counts)  # 0: a repeat that only keeps the ranks in step
        for group in (output.sums, objective.metrics(output, on_device)):
            sums.add({name: (weight * total, weight * count) for name, (total, count) in group.items()})
        if counts and observe is not None:
            observe(output, on_device)
        targets = objective.class_targets(on_device)
        if targets is not None:
            counted = weight * torch.bincount(targets, minlength=objective.num_classes or output.logits.shape[-1]).to(
                torch.float64
            )
            classes = counted if classes is None else classes + counted
    engine.module.train()
    results = sums.means(engine.sum_over_ranks)
    if classes is not None:
        total = engine.sum_over_ranks(classes)
        results[MAJORITY] = float(total.max() / total.sum())
    return results


def evaluate_all(
    engine: Engine, tasks: Mapping[str, tuple[Objective, EvaluationLoader]], poll: Callable[[], None] | None = None
) -> dict[str, dict[str, float]]:
    """`evaluate` for each named task."""
    return {name: evaluate(engine, objective, loader, poll=poll) for name, (objective, loader) in tasks.items()}
