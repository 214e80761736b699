"""A tiny real model on random batches, for tests of training."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from villa_ds.batch import Batch, ImageSpan, Mismatched, Regions, Sample
from villa_ds.config import ModelConfig
from villa_ds.config_objectives import ItmConfig, ObjectivesConfig, RetrievalConfig
from villa_ds.data.collate import collate
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.data.store import LocalStore
from villa_ds.objectives import itm, mlm, mrm, retrieval, vqa  # noqa: F401  (registers the objectives)
from villa_ds.objectives.base import Objective, build_objective
from villa_ds.rng import Stream
from villa_ds.train.module import TrainModule, build_module

VOCABULARY = Vocabulary(size=50, sha256="v", pad=0, unk=1, cls=2, sep=3, mask=4, random_low=5)
WIDTH, CLASSES = 12, 7
MANIFEST = Manifest(
    store=LocalStore(Path("tiny")), shards=(), feature_width=WIDTH, detector_classes=CLASSES, label_format="dense",
    vocabulary=VOCABULARY, answers=tuple("abcde"), extractor="e", source="s", command="c", fingerprint="f",
    index_files={},
)  # fmt: skip


def tiny_objectives(*names: str, ot_weight: float = 0.1) -> list[Objective]:
    few = RetrievalConfig(candidates=5, hard_negatives=2)
    settings = ObjectivesConfig(itm=ItmConfig(ot_weight=ot_weight), retrieval=few)
    return [build_objective(name, settings, MANIFEST) for name in names]


def tiny_module(
    *names: str, dropout: float = 0.0, dtype: torch.dtype = torch.float64, seed: int = 0, ot_weight: float = 0.1
) -> TrainModule:
    """Two layers, 16 wide; weights larger than BERT's so that gradients and perturbations matter."""
    config = ModelConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=20,
        type_vocab_size=2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(seed)
    return build_module(config, tiny_objectives(*names, ot_weight=ot_weight), MANIFEST).to(dtype)


def tiny_sample(number: int, *, negative: bool = False, candidates: int = 0) -> Sample:
    stream = Stream("tiny", number)
    pieces = 5 + stream.integers(3 + number % 4, 45)
    return Sample(
        id=f"t{number}",
        word_pieces=pieces.astype(np.int32),
        regions=_regions(stream, 2 + number % 3),
        target={"labels": [number % 5], "scores": [1.0]},
        negative=_regions(stream, 3) if negative else None,
        candidates=[
            Mismatched(_regions(stream, 2 + place % 3), [[10 + place, 20], [30]]) for place in range(candidates)
        ],
    )


def _regions(stream: Stream, count: int) -> Regions:
    labels = stream.uniform(count * CLASSES).reshape(count, CLASSES)
    return Regions(
        features=(stream.uniform(count * WIDTH).reshape(count, WIDTH) * 2 - 1).astype(np.float16),
        boxes=stream.uniform(count * 7).reshape(count, 7).astype(np.float32),
        labels=(labels / labels.sum(1, keepdims=True)).astype(np.float16),
        images=(ImageSpan("i", 0, count),),
    )


def tiny_batch(objective: Objective, rows: int = 4, start: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """`dtype` is that of boxes and features, which perturbations take over."""
    examples = [
        objective.prepare(
            tiny_sample(
                number,
                negative=bool(objective.negative_probability) and number % 2 == 1,
                candidates=objective.candidates,
            ),
            Stream("prepare", number),
        )
        for number in range(start, start + rows)
    ]
    batch = collate(examples, objective.reads)
    return dataclasses.replace(batch, boxes=batch.boxes.to(dtype), features=batch.features.to(dtype))
