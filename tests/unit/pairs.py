"""Rows of chosen lengths, samples and sizes for unit tests of models and objectives."""

import numpy as np
import torch
from torch import Tensor

from tests.tiny import CLASSES, MANIFEST, VOCABULARY, WIDTH
from villa_ds.batch import Batch, ImageSpan, Reads, Regions, Sample
from villa_ds.config import ModelConfig
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.models.presets import BackboneSizes, resolve_sizes
from villa_ds.objectives.base import Objective, build_objective

LONGEST = 10


def sizes_of(dropout: float = 0.0, activation_checkpointing: bool = False) -> BackboneSizes:
    """Two layers, 16 wide, with BERT's initialisation."""
    config = ModelConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=LONGEST,
        type_vocab_size=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        activation_checkpointing=activation_checkpointing,
    )
    return resolve_sizes(config, VOCABULARY.size, WIDTH)


def objective_of(name: str, settings: ObjectivesConfig | None = None) -> Objective:
    return build_objective(name, settings or ObjectivesConfig(), MANIFEST)


def batch_of_lengths(
    text_lengths: tuple[int, ...] = (6, 3, 4),
    region_counts: tuple[int, ...] = (2, 5, 4),
    reads: Reads = Reads.ALL,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Random rows of these lengths, zero padded; nothing masked, no targets."""
    generator = torch.Generator().manual_seed(5)
    rows, text, regions = len(text_lengths), max(text_lengths), max(region_counts)
    lengths, counts = torch.tensor(text_lengths), torch.tensor(region_counts)
    text_valid = torch.arange(text) < lengths[:, None]
    region_valid = torch.arange(regions) < counts[:, None]

    def uniform(width: int) -> Tensor:
        values = torch.rand(rows, regions, width, generator=generator, dtype=torch.float64)
        return (values * region_valid[..., None]).to(dtype)

    return Batch(
        ids=tuple(map(str, range(rows))),
        input_ids=torch.randint(5, VOCABULARY.size, (rows, text), generator=generator) * text_valid,
        token_types=torch.zeros(rows, text, dtype=torch.int64),
        text_lengths=lengths,
        features=uniform(WIDTH),
        boxes=uniform(7),
        region_types=torch.ones(rows, regions, dtype=torch.int64),
        region_counts=counts,
        joint_length=int((lengths + counts).max()),
        tokens=int((lengths + counts).sum()),
        reads=reads,
    )


def regions_of(count: int, name: str = "image", labels: bool = True) -> Regions:
    """Random regions, the same for the same name."""
    draw = np.random.default_rng(list(name.encode()))
    return Regions(
        features=draw.random((count, WIDTH)).astype(np.float16),
        boxes=draw.random((count, 7)).astype(np.float32),
        labels=draw.dirichlet(np.ones(CLASSES), count).astype(np.float16) if labels else None,
        images=(ImageSpan(name, 0, count),),
    )


def sample_of(
    pieces: tuple[int, ...] = (11, 12, 13),
    image: Regions | None = None,
    target: dict[str, object] | None = None,
    negative: Regions | None = None,
) -> Sample:
    return Sample(
        "pair", np.array(pieces, dtype=np.int32), image if image is not None else regions_of(4), target or {}, negative
    )
