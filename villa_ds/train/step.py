"""One optimizer step: `train_step` plain, `adversarial_step` with the adversary. Every pass is one engine micro-step.

The gradient is the unweighted mean over the step's M global micro-batches of each one's own mean loss: a rank weighs
each of its M/W by W/M, and the engine averages over the W ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from villa_ds.batch import Batch, LossOutput, Perturbation
from villa_ds.objectives.base import Objective
from villa_ds.rng import seed_of
from villa_ds.train.adversary import Adversary, PassRecord, row_norm
from villa_ds.train.metrics import SumTable
from villa_ds.train.torch_engine import Engine


@dataclass(frozen=True)
class StepInput:
    """What one rank works on in one optimizer step."""

    step: int  # 1-based
    seed: int
    objective: Objective
    batches: tuple[Batch, ...]  # this rank's micro-batches, in lane order
    lanes: tuple[int, ...]  # their global micro-batch numbers, 0..M-1


def train_step(engine: Engine, work: StepInput) -> SumTable:
    """Accumulate the plain gradient of all micro-batches; the caller updates."""
    sums = SumTable()
    for micro in micro_batches(engine, work):
        output = micro.forward(None, mask_draw=0)
        micro.backward(output.loss, final=True)
        sums.add(output.sums)
    return sums


def adversarial_step(engine: Engine, work: StepInput, adversary: Adversary, strength: float) -> SumTable:
    """Accumulate the adversarial gradient of all micro-batches; the caller updates. `strength`: warm-up, 0..1."""
    sums = SumTable()
    backbone = engine.module.backbone
    for micro in micro_batches(engine, work):
        clean = adversary.accumulate(
            micro, micro.batch, work.objective.divergence, (backbone.hidden_size, backbone.feature_width),
            seed=seed_of(work.seed, "perturbation", work.step, micro.lane), strength=strength,
            observe=lambda record: sums.add(_pass_sums(record)),
        )  # fmt: skip
        if clean is not None:
            sums.add(clean.sums)
    return sums


def micro_batches(engine: Engine, work: StepInput) -> "Iterator[MicroBatchPasses]":
    """This rank's micro-batches in order, each ready to run passes."""
    for position, (lane, batch) in enumerate(zip(work.lanes, work.batches, strict=True)):
        yield MicroBatchPasses(engine, work, lane, batch, last=position == len(work.batches) - 1)


class MicroBatchPasses:
    """Passes of one micro-batch (`adversary.Passes`): seeds dropout, weighs, marks the last backward."""

    def __init__(self, engine: Engine, work: StepInput, lane: int, batch: Batch, *, last: bool) -> None:
        self.batch, self.lane = batch.to(engine.device, non_blocking=True), lane
        self.stochastic = engine.module.stochastic
        self.keeps_clean_graph = engine.keeps_clean_graph
        self._engine, self._work, self._last = engine, work, last
        self._weight = 1.0 / len(work.batches)
        if work.objective.screens:
            self.batch = self._screened()

    def _screened(self) -> Batch:
        """The rows that the objective keeps after one pass without dropout and gradient; every rank makes that pass."""
        self._engine.module.eval()
        with torch.no_grad():
            output = self._engine.probe(self.batch, self._work.objective.name, None)
        self._engine.module.train()
        return self._work.objective.screened(output, self.batch)

    @property
    def gradient_scale(self) -> float:
        """What a gradient that `backward` leaves behind is multiplied by."""
        return self._weight * self._engine.loss_scale

    def forward(self, perturbation: Perturbation | None, mask_draw: int) -> LossOutput:
        """A pass through the engine."""
        with self._dropout_masks(mask_draw):
            return self._engine.forward(self.batch, self._work.objective.name, perturbation)

    def forward_kept(self, perturbation: Perturbation | None, mask_draw: int) -> LossOutput:
        """A pass whose graph outlives others."""
        with self._dropout_masks(mask_draw):
            return self._engine.forward_kept(self.batch, self._work.objective.name, perturbation)

    def probe(self, perturbation: Perturbation | None, mask_draw: int) -> LossOutput:
        """A pass for the gradients of its inputs, or for its values."""
        with self._dropout_masks(mask_draw):
            return self._engine.probe(self.batch, self._work.objective.name, perturbation)

    def backward(self, scalar: Tensor, *, final: bool, retain_graph: bool = False) -> None:
        """One engine micro-step."""
        self._engine.backward(scalar * self._weight, boundary=final and self._last, retain_graph=retain_graph)

    @contextmanager
    def _dropout_masks(self, mask_draw: int) -> Iterator[None]:
        if not self.stochastic:
            yield
            return
        # Keyed by the global micro-batch, never by the rank; restored, so that nothing depends on what ran before.
        devices = [self.batch.input_ids.device] if self.batch.input_ids.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed_of(self._work.seed, "dropout", self._work.step, self.lane, mask_draw))
            yield


def _pass_sums(record: PassRecord) -> dict[str, tuple[Tensor, Tensor]]:
    """Perturbation metrics of one pass: mean loss and divergence per pass, mean row norm per modality, bad rows."""
    one = torch.ones_like(record.loss)
    sums = {
        "perturbed_loss": (record.loss, one),
        "kl": (record.divergence, one),
        "nonfinite_ascents": (record.nonfinite_rows, one),
    }
    if record.step > 0:
        for name, delta in record.deltas.items():
            norms = row_norm(delta, "l2")
            sums[f"{name}_perturbation_norm"] = (norms.sum(), torch.full_like(norms.sum(), norms.numel()))
    return sums
