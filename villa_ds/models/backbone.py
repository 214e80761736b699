"""The backbone protocol: embed, then encode; whatever is added in between is not the backbone's concern."""

import abc
from collections.abc import Callable

from torch import Tensor, nn

from villa_ds.batch import Batch, Embeddings, Encoded
from villa_ds.errors import ConfigError
from villa_ds.models.presets import BackboneSizes


class Backbone(nn.Module, abc.ABC):
    """A transformer over text and image regions.

    `prefix` is the name under which its parameters appear in the model's state dict (the reference code's own).
    """

    prefix: str
    hidden_size: int  # H, the width of states and of `Embeddings.text`
    feature_width: int  # D, the width of `Embeddings.regions`
    vocabulary_size: int  # V
    initializer_range: float
    uses_dropout: bool  # whether a forward pass in training draws masks
    sizes: BackboneSizes  # what it was built from

    @property
    @abc.abstractmethod
    def word_embedding(self) -> Tensor:
        """[V, H] the word embedding parameter, which the MLM decoder is tied to."""

    @property
    @abc.abstractmethod
    def feature_projection(self) -> Tensor:
        """[H, D] the feature projection parameter, which masked-feature regression is tied to."""

    @abc.abstractmethod
    def embed(self, batch: Batch) -> Embeddings:
        """Word embeddings [B, T, H] and region features [B, R, D], in float32 or wider."""

    @abc.abstractmethod
    def compile_layers(self) -> None:
        """Have torch.compile run the layers from now on, or warn and leave them as they are where it cannot."""

    @abc.abstractmethod
    def encode(self, embeddings: Embeddings, batch: Batch) -> Encoded:
        """Final states of the slots that `batch.reads` asks for."""


_BUILDERS: dict[str, Callable[..., Backbone]] = {}


def register(name: str) -> Callable[[Callable[..., Backbone]], Callable[..., Backbone]]:
    """Class decorator: make a backbone known under `name`."""

    def add(builder: Callable[..., Backbone]) -> Callable[..., Backbone]:
        _BUILDERS[name] = builder
        return builder

    return add


def builder_of(name: str) -> Callable[..., Backbone]:
    """The registered backbone class."""
    if name not in _BUILDERS:
        raise ConfigError(f"model.backbone: {name!r} is not one of {', '.join(sorted(_BUILDERS))}")
    return _BUILDERS[name]
