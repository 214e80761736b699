"""Held-out losses and metrics per task, beside what a trivial answer would score."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from villa_ds.batch import Batch, LossOutput
from villa_ds.data.loader import EvaluationLoader
from villa_ds.objectives.base import UNLABELLED, Objective
from villa_ds.train.metrics import SumTable
from villa_ds.train.torch_engine import Engine

MAJORITY = "majority_baseline"
POLL_EVERY = 8  # micro-batches between questions whether to stop: a preempted job has seconds


class Evaluated(Protocol):
    """What is evaluated: an engine, or several models together."""

    @property
    def module(self) -> nn.Module:
        """Its parameters, whose mode is set."""

    @property
    def device(self) -> torch.device:
        """Where batches go."""

    def probe(self, batch: Batch, objective: str, perturbation: None) -> LossOutput:
        """A pass that is not differentiated for the parameters."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Element-wise sum, the same on all ranks."""


Observer = Callable[[LossOutput, Batch], None]


@torch.no_grad()
def evaluate(
    engine: Evaluated,
    objective: Objective,
    loader: EvaluationLoader,
    observe: Observer | None = None,
    poll: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Means over the loader's micro-batches, over all ranks; the module is left in training mode.

    `observe` is called with every output that is no repeat, `poll` now and then by all ranks together; it may raise.

    `majority_baseline` is the accuracy of always answering the evaluated set's commonest class: the best that ignores
    the input can do, so a trained model must beat it.
    """
    tally = Tally(objective)
    engine.module.eval()
    for number, (batch, counts) in enumerate(loader):
        if poll is not None and number % POLL_EVERY == 0:
            poll()
        on_device = batch.to(engine.device, non_blocking=True)
        output = engine.probe(on_device, objective.name, None)
        tally.add(output, on_device, float(counts))  # 0: a repeat that only keeps the ranks in step
        if counts and observe is not None:
            observe(output, on_device)
    engine.module.train()
    return tally.results(engine.sum_over_ranks)


class Tally:
    """The metrics of an objective over micro-batches."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._sums = SumTable()
        self._classes: Tensor | None = None

    def add(self, output: LossOutput, batch: Batch, weight: float = 1.0) -> None:
        """Count a micro-batch's output `weight` times, unless there is nothing to compare it with."""
        objective = self._objective
        weight *= not any(UNLABELLED in note for note in batch.notes)
        for group in (output.sums, objective.metrics(output, batch)):
            self._sums.add({name: (weight * total, weight * count) for name, (total, count) in group.items()})
        targets = objective.class_targets(batch)
        if targets is not None:
            classes = objective.num_classes or output.logits.shape[-1]
            counted = weight * torch.bincount(targets, minlength=classes).to(torch.float64)
            self._classes = counted if self._classes is None else self._classes + counted

    def results(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means, and the majority baseline where there are classes."""
        results = self._sums.means(sum_over_ranks)
        if self._classes is not None:
            total = sum_over_ranks(self._classes)
            if total.sum() > 0:
                results[MAJORITY] = float(total.max() / total.sum())
        return results


def evaluate_all(
    engine: Engine, tasks: Mapping[str, tuple[Objective, EvaluationLoader]], poll: Callable[[], None] | None = None
) -> dict[str, dict[str, float]]:
    """`evaluate` for each named task."""
    return {name: evaluate(engine, objective, loader, poll=poll) for name, (objective, loader) in tasks.items()}
