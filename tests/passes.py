"""A `Passes` over a bare module, as thin as it can be: gradients accumulate unscaled in `.grad`."""

from torch import Tensor

from villa_ds.batch import Batch, LossOutput, Perturbation
from villa_ds.train.module import TrainModule


class ModulePasses:
    """Runs passes of one micro-batch and counts them."""

    stochastic = False
    gradient_scale = 1.0

    def __init__(self, module: TrainModule, batch: Batch, objective: str, *, keeps_clean_graph: bool = True) -> None:
        self.keeps_clean_graph = keeps_clean_graph
        self.forwards = self.backwards = self.finals = 0
        self._module, self._batch, self._objective = module, batch, objective

    def forward(self, perturbation: Perturbation | None, mask_draw: int) -> LossOutput:
        self.forwards += 1
        output: LossOutput = self._module(self._batch, self._objective, perturbation)
        return output

    forward_kept = forward
    probe = forward

    def backward(self, scalar: Tensor, *, final: bool, retain_graph: bool = False) -> None:
        self.backwards += 1
        self.finals += final
        scalar.backward(retain_graph=retain_graph)
