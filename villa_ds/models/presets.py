"""Named model sizes, and a recipe's `model` section resolved to the numbers that a backbone is built from."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from villa_ds.config import ModelConfig
from villa_ds.errors import ConfigError


@dataclass(frozen=True)
class BackboneSizes:
    """Every number a backbone needs; nothing is left open."""

    vocabulary_size: int  # V
    feature_width: int  # D
    hidden_size: int  # H
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int  # longest text, [CLS] and [SEP] counted
    type_vocab_size: int
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    initializer_range: float
    fused_layer_norm: bool
    onednn: bool
    activation_checkpointing: bool


_COMMON: Mapping[str, int | float] = {
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}

PRESETS: Mapping[str, Mapping[str, int | float]] = {
    "uniter-base": {
        **_COMMON,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "uniter-large": {
        **_COMMON,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "uniter-small": {
        **_COMMON,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
    "uniter-demo": {
        **_COMMON,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "max_position_embeddings": 64,
    },
}


def resolve_sizes(config: ModelConfig, vocabulary_size: int, feature_width: int) -> BackboneSizes:
    """Fill `config`'s open sizes from its preset; a size given in the recipe wins over the preset.

    `vocabulary_size` and `feature_width` come from the data set's manifest. A size that neither gives, an unknown
    preset or a width that the heads do not divide is a `ConfigError` with the dotted key.
    """
    if config.preset is not None and config.preset not in PRESETS:
        raise ConfigError(f"model.preset: {config.preset!r} is not one of {', '.join(sorted(PRESETS))}")
    preset = PRESETS[config.preset] if config.preset is not None else {}
    values: dict[str, int | float] = {}
    for item in dataclasses.fields(BackboneSizes):
        if item.name in ("vocabulary_size", "feature_width"):
            continue
        given = getattr(config, item.name)
        value = preset.get(item.name) if given is None else given
        if value is None:
            raise ConfigError(f"model.{item.name}: missing; give it a value, or name a model.preset")
        values[item.name] = value
    sizes = BackboneSizes(vocabulary_size=vocabulary_size, feature_width=feature_width, **values)  # type: ignore[arg-type]
    _check(sizes)
    return sizes


def _check(sizes: BackboneSizes) -> None:
    for item in dataclasses.fields(sizes):
        value = getattr(sizes, item.name)
        if item.type is int and value < 1:
            raise ConfigError(f"model.{item.name}: {value!r} does not do: give 1 or more")
        if item.name.endswith("dropout_prob") and not 0 <= value < 1:
            raise ConfigError(f"model.{item.name}: {value!r} does not do: give a probability below 1")
        if item.name == "initializer_range" and value < 0:
            raise ConfigError(f"model.{item.name}: {value!r} does not do: give 0 or more")
    if sizes.hidden_size % sizes.num_attention_heads:
        raise ConfigError(
            f"model.num_attention_heads: {sizes.num_attention_heads} heads do not divide "
            f"model.hidden_size {sizes.hidden_size} evenly"
        )
