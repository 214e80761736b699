"""The one module that an engine wraps: a backbone and the heads of its objectives."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from villa_ds.batch import Batch, Embeddings, LossOutput, Perturbation
from villa_ds.config import ModelConfig
from villa_ds.data.manifest import Manifest
from villa_ds.errors import ConfigError
from villa_ds.models.backbone import Backbone, builder_of
from villa_ds.models.presets import resolve_sizes
from villa_ds.models.weights import reference_names
from villa_ds.objectives.base import Objective, common_type_rows

TEXT_AND_REGIONS = 2  # token types of every backbone


class TrainModule(nn.Module):
    """A backbone under its own prefix, and beside it each objective's head under its `head_name`.

    The state dict is the reference's but for the joined query, key and value projections; objectives that name the same
    head share it. `objectives` maps an objective's name to it.
    """

    def __init__(self, backbone: Backbone, objectives: Iterable[Objective]) -> None:
        super().__init__()
        self.objectives = {objective.name: objective for objective in objectives}
        self._prefix = backbone.prefix
        self.add_module(self._prefix, backbone)
        for objective in self.objectives.values():
            if objective.head_name not in self._modules:
                self.add_module(objective.head_name, objective.build_head(backbone))
        names = Counter(part for name in self.state_dict() for part in reference_names(name))
        if shared := sorted({name.rpartition(".")[0] for name, count in names.items() if count > 1}):
            raise ConfigError(
                f"tasks: objectives {', '.join(self.objectives)} have two heads of one name, {', '.join(shared)}: "
                "train them in runs of their own"
            )

    @property
    def backbone(self) -> Backbone:
        """The backbone."""
        return cast(Backbone, self.get_submodule(self._prefix))

    @property
    def stochastic(self) -> bool:
        """Whether a forward pass draws dropout masks now."""
        return self.training and self.backbone.uses_dropout

    @property
    def downstream_heads(self) -> list[str]:
        """Names of the heads whose learning rate `optimizer.head_multiplier` multiplies."""
        return sorted({objective.head_name for objective in self.objectives.values() if objective.downstream})

    def head_of(self, objective_name: str) -> nn.Module:
        """The head of an objective."""
        return self.get_submodule(self.objectives[objective_name].head_name)

    def forward(self, batch: Batch, objective_name: str, perturbation: Perturbation | None = None) -> LossOutput:
        """One pass: embed, add `perturbation` at the seam, encode, loss of the objective."""
        embeddings = self.backbone.embed(batch)
        if perturbation is not None:
            embeddings = Embeddings(
                _added(embeddings.text, perturbation.text), _added(embeddings.regions, perturbation.regions)
            )
        encoded = self.backbone.encode(embeddings, batch)
        return self.objectives[objective_name].loss(self.head_of(objective_name), encoded, batch)


def _added(embedding: Tensor, perturbation: Tensor | None) -> Tensor:
    return embedding if perturbation is None else embedding + perturbation


def build_module(config: ModelConfig, objectives: Iterable[Objective], manifest: Manifest) -> TrainModule:
    """Build and initialise, from torch's default generator, the module that trains `objectives`.

    Vocabulary size and feature width are those of `manifest`; token types are as many as the objectives use, unless
    the recipe says how many.
    """
    objectives = list(objectives)
    types = len(common_type_rows(objectives))
    if config.type_vocab_size is None and types > TEXT_AND_REGIONS:
        config = dataclasses.replace(config, type_vocab_size=types)
    sizes = resolve_sizes(config, manifest.vocabulary.size, manifest.feature_width)
    return TrainModule(builder_of(config.backbone)(sizes), objectives)
