"""Several models of one recipe whose answers are averaged.

All are on the device at the same time, weights only, so that every micro-batch is read and prepared once and no scores
are kept: memory is the members' weights, whatever the size of the set. One after the other would need as many passes
over the data, and all scores of all members until the last (6.3 GB a member for a million questions of
3,129 answers at half precision).

Objectives whose head gives the logits of exclusive classes average probabilities: the mixture's log loss is at most the
members' mean. Where a head gives scores of their own (independent sigmoids, ranks, regressions) these are averaged as
they are: a sigmoid's probabilities saturate, so that in their mean one that is sure would count as much as one that is
nearly sure, and the answers' order would hang on the last digits.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from villa_ds.batch import Batch, LossOutput
from villa_ds.config import EngineConfig, ModelConfig
from villa_ds.data.manifest import Manifest
from villa_ds.objectives.base import Objective
from villa_ds.objectives.reductions import widen
from villa_ds.train.module import TrainModule, build_module
from villa_ds.train.parameters import load_weights
from villa_ds.train.torch_engine import DTYPES, device_of


class Ensemble:
    """One process's models; `evaluate` takes it for an engine. `own` is each member's output of the last pass."""

    own: list[LossOutput]
    rank, world = 0, 1

    def __init__(self, members: Sequence[TrainModule], device: torch.device) -> None:
        self.module, self.device = nn.ModuleList(members), device
        self._members = list(members)

    @property
    def objectives(self) -> dict[str, Objective]:
        """By name, those of every member."""
        return self._members[0].objectives

    @torch.no_grad()
    def probe(self, batch: Batch, objective: str, perturbation: None = None) -> LossOutput:
        """The output of the averaged scores. What a loss takes from states (alignment) is the members' mean."""
        task, heads, encodings = self.objectives[objective], [], []
        self.own = []
        for member in self._members:
            head = _Recorded(member.head_of(objective))
            encoded = member.backbone.encode(member.backbone.embed(batch), batch)
            self.own.append(task.loss(head, encoded, batch))
            heads.append(head.output)
            encodings.append(encoded)
        if len(heads) == 1:
            return self.own[0]
        given = _Given(averaged(heads, task.averages))
        outputs = [task.loss(given, encoded, batch) for encoded in encodings]
        means = {name: _mean([output.sums[name] for output in outputs]) for name in outputs[0].sums}
        return dataclasses.replace(outputs[0], loss=torch.stack([each.loss for each in outputs]).mean(), sums=means)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """There is one process."""
        return values

    def gather(self, value: object) -> list[object]:
        """There is one process."""
        return [value]


def averaged(scores: Sequence[Tensor], averages: str) -> Tensor:
    """One head output for several of the same shape [..., C]: see the module's docstring.

    Averaged probabilities come as their logarithms, which are logits of them.
    """
    if averages == "logits":
        return torch.stack([widen(score) for score in scores]).mean(0)
    total = widen(scores[0]).log_softmax(-1)
    for score in scores[1:]:
        total = torch.logaddexp(total, widen(score).log_softmax(-1))
    return total - torch.log(torch.tensor(float(len(scores))))


def _mean(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([value for value, _ in pairs]).mean(0), pairs[0][1]


def load_ensemble(
    model: ModelConfig,
    objectives: Sequence[Objective],
    manifest: Manifest,
    engine: EngineConfig,
    folders: Sequence[Path],
) -> Ensemble:
    """The models of these checkpoints, of one configuration. CheckpointError for one of another."""
    if engine.threads:
        torch.set_num_threads(engine.threads)
    device = device_of(engine)
    # float16 is a matter of training's memory; without its loss scaling float32 is the safe type to read it in
    dtype = DTYPES["float32" if engine.precision == "float16" else engine.precision]
    members = []
    for folder in folders:
        member = build_module(model, objectives, manifest)
        load_weights(member, folder)
        members.append(member.requires_grad_(False).to(device, dtype).eval())
    return Ensemble(members, device)


class _Recorded(nn.Module):
    """A head whose output is kept."""

    output: Tensor

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._head = head

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the head makes of it."""
        self.output = self._head(*inputs)
        return self.output


class _Given(nn.Module):
    """Stands in for a head: gives what is decided already."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_: Tensor) -> Tensor:
        """That."""
        return self._output
