"""The objective protocol: one concept for a pre-training task and a downstream task.

The data side (`prepare`) runs in loader processes and touches numpy only; the model side builds a head once and turns
encoded states into a loss. An objective holds settings, never parameters: heads live in the module that is trained.
"""

import abc
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from villa_ds.batch import Batch, Encoded, Example, LossOutput, Reads, Sample
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.manifest import Manifest
from villa_ds.data.sizes import SPECIAL_TOKENS, IntArray, PairSizes, RowRule
from villa_ds.errors import ConfigError
from villa_ds.models.backbone import Backbone
from villa_ds.models.weights import Adaptation
from villa_ds.rng import Stream

Sums = Mapping[str, tuple[Tensor, Tensor]]
Rows = Sequence[Mapping[str, Any]]  # predictions: what `Objective.predictions` says of each sample, and its `id`
UNLABELLED = "unlabelled"  # the note of a sample without a right answer


class Objective(abc.ABC):
    """One task. Subclasses are picklable and hold plain settings."""

    name: str
    head_name: str  # key of the head in the trained module, the reference code's own; objectives may share one
    reads: Reads
    downstream: bool = False  # a head trained from scratch on pre-trained weights, at its own learning rate
    rows: int = 1  # of a batch that a sample takes
    num_classes: int | None = None  # of `class_targets`; None: as many as the logits have
    adaptation: Adaptation = Adaptation()  # how pre-trained weights are made to fit
    negative_probability: float = 0.0  # share of pairs whose image the plan replaces by another
    candidates: int = 0  # other images, each with a text, that the plan draws for every pair
    reads_labels: bool = False  # whether `prepare` looks at `Regions.labels`, which are not read otherwise
    evaluates: bool = False  # a copy for held-out sets, see `held_out`
    screens: bool = False  # whether `screened` decides which rows are trained
    truth: frozenset[str] = frozenset()  # keys of `predictions` that tell of the target
    averages: Literal["probabilities", "logits"] = "probabilities"  # of the head's output, what an ensemble averages

    @property
    def row_rule(self) -> RowRule:
        """How the plan learns what room a sample takes, from the index alone."""
        return RowRule(self.own_text, self.planned_tokens)

    def own_text(self, sizes: PairSizes) -> IntArray:
        """[P] word pieces and inner separators of the longest text that is made of a sample's own."""
        return sizes.text

    def planned_tokens(self, sizes: PairSizes) -> IntArray:
        """[P] rows of a sample x its longest row; never less than what `prepare` makes of it."""
        return self.rows * (self.own_text(sizes) + SPECIAL_TOKENS + np.maximum(sizes.regions, sizes.other_regions))

    @abc.abstractmethod
    def prepare(self, sample: Sample, stream: Stream) -> Example:
        """Special tokens, masks and targets of one sample; all randomness from `stream`."""

    @abc.abstractmethod
    def build_head(self, backbone: Backbone) -> nn.Module:
        """A freshly initialised head; may share parameters with `backbone` (tied weights)."""

    @abc.abstractmethod
    def loss(self, head: nn.Module, encoded: Encoded, batch: Batch) -> LossOutput:
        """Loss, logits and metric sums of one pass."""

    def screened(self, output: LossOutput, batch: Batch) -> Batch:
        """The rows of `batch` to train on, by what a pass in evaluation mode scored; called if `screens`."""
        return batch

    def held_out(self) -> "Objective":
        """The objective as held-out sets are evaluated with it; `loss` takes the batches of both.

        By default a copy that `evaluates`: where training refuses a sample without a right answer (of a test split), it
        takes it and notes `UNLABELLED`, so that it is predicted but enters no mean.
        """
        twin = copy.copy(self)
        twin.evaluates = True
        return twin

    def divergence(self, logits: Tensor, other: Tensor) -> Tensor:
        """Symmetric Kullback-Leibler divergence: summed over classes, mean over the other axes. Scalar.

        Elementwise it is (p - q)(log p - log q), derivatives through both arguments (VILLA, Eq. 3 and released code).
        """
        return symmetric_kl(logits, other)

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """Further (sum, count) pairs for evaluation, such as accuracy. Default: none."""
        return {}

    def predictions(self, output: LossOutput, batch: Batch) -> list[dict[str, object]]:
        """What is predicted for each sample of the batch, as JSON values; evaluation adds its id. Default: none."""
        return []

    def summary(self, rows: Rows) -> Mapping[str, float]:
        """Metrics that need the predictions of a whole set, such as accuracy by question type. Default: none."""
        return {}

    def submission(self, rows: Rows) -> tuple[str, str] | None:
        """(suffix, content) of the file that the task's evaluation server takes; None (the default) without one."""
        return None

    def forecast(self, output: LossOutput, batch: Batch, top: int) -> list[dict[str, object]]:
        """`predictions` for samples whose truth is not known, with up to `top` alternatives where there are many."""
        rows = self.predictions(output, batch)
        return [{key: value for key, value in row.items() if key not in self.truth} for row in rows]

    def class_targets(self, batch: Batch) -> Tensor | None:
        """[M] int64, the class that is right for each item of the batch, below `num_classes`.

        Evaluation counts them for the majority baseline. None (the default) where there are no classes.
        """
        return None


def symmetric_kl(logits: Tensor, other: Tensor) -> Tensor:
    """KL(p||q) + KL(q||p) of two sets of logits [..., C]: summed over C, mean over the rest; float32 or wider."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p, log_q = logits.to(wide).log_softmax(-1), other.to(wide).log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()


def require_types(backbone: Backbone, objective: Objective) -> None:
    """ConfigError unless the model has the token types that `objective` uses."""
    rows, wanted = backbone.sizes.type_vocab_size, len(objective.adaptation.type_rows)
    if rows < wanted:
        raise ConfigError(
            f"model.type_vocab_size: {rows!r} does not do: objective {objective.name!r} has {wanted} token types; "
            f"set it to {wanted}, or leave it out (smaller pre-trained tables are grown)"
        )


def common_type_rows(objectives: Iterable[Objective]) -> tuple[int, ...]:
    """For each row of the token type table the row that it starts from, such that it suits all `objectives`.

    ConfigError if two of them use a row for different things.
    """
    common: tuple[int, ...] = ()
    owner = ""
    for objective in objectives:
        rows = objective.adaptation.type_rows
        if any(mine != other for mine, other in zip(rows, common, strict=False)):
            raise ConfigError(
                f"tasks: objectives {owner!r} and {objective.name!r} use the rows of the token type table for "
                "different things: train them in runs of their own"
            )
        if len(rows) > len(common):
            common, owner = rows, objective.name
    return common


Builder = Callable[[str, ObjectivesConfig, Manifest], Objective]
_BUILDERS: dict[str, Builder] = {}


def register(*names: str) -> Callable[[Builder], Builder]:
    """Decorator of a builder ``(name, settings, manifest) -> Objective``."""

    def add(builder: Builder) -> Builder:
        for name in names:
            _BUILDERS[name] = builder
        return builder

    return add


def build_objective(name: str, settings: ObjectivesConfig, manifest: Manifest) -> Objective:
    """The objective `name` for a data set described by `manifest` (its vocabulary, detector classes, answers)."""
    if name not in _BUILDERS:
        raise ConfigError(f"tasks: objective {name!r} is not one of {', '.join(sorted(_BUILDERS))}")
    return _BUILDERS[name](name, settings, manifest)
