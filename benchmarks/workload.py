"""What the step benchmarks run on: VQA v2's sizes, random features, rows of equal or of realistic length."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import record
import torch

from villa_ds.batch import Batch, ImageSpan, Regions, Sample
from villa_ds.config import EngineConfig, ModelConfig, OptimizerConfig
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.collate import collate
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.data.store import LocalStore
from villa_ds.objectives.base import Objective, build_objective
from villa_ds.rng import Stream
from villa_ds.train.module import build_module
from villa_ds.train.torch_engine import TorchEngine

ANSWERS, WIDTH = 3129, 2048


def manifest() -> Manifest:
    """Sizes of VQA v2 with bottom-up features; there are no shards behind it."""
    vocabulary = Vocabulary(size=28996, sha256="", pad=0, unk=100, cls=101, sep=102, mask=103, random_low=106)
    return Manifest(
        store=LocalStore(record.RESULTS), shards=(), feature_width=WIDTH, detector_classes=0, label_format="none",
        vocabulary=vocabulary, answers=(), extractor="", source="", command="", fingerprint="", index_files={},
    )  # fmt: skip


def vqa_objective() -> Objective:
    """Question answering with VQA v2's 3,129 answers."""
    settings = ObjectivesConfig()
    return build_objective("vqa", ObjectivesConfig(vqa=type(settings.vqa)(num_answers=ANSWERS)), manifest())


def batch_of(objective: Objective, lengths: Sequence[tuple[int, int]]) -> Batch:
    """A batch with one row for each (word pieces, regions)."""
    examples = []
    for row, (words, regions) in enumerate(lengths):
        stream = Stream("benchmark", row)
        features = (stream.uniform(regions * WIDTH).reshape(regions, WIDTH) * 2).astype(np.float16)
        boxes = stream.uniform(regions * 7).reshape(regions, 7).astype(np.float32)
        pieces = (1000 + stream.integers(words, 20000)).astype(np.int32)
        image = Regions(features, boxes, None, (ImageSpan("image", 0, regions),))
        examples.append(objective.prepare(Sample(str(row), pieces, image, {"labels": [row], "scores": [1.0]}), stream))
    return collate(examples, objective.reads)


def mixed_lengths(rows: int, bucket: int = 512) -> list[tuple[int, int]]:
    """Rows that a length bucket puts side by side: questions of 3 to 20 pieces, images of 10 to 70 regions.

    Of `bucket` drawn pairs, sorted by length, the `rows` around the middle.
    """
    stream = Stream("benchmark", "lengths")
    words = 3 + (stream.uniform(bucket) * stream.uniform(bucket) * 18).astype(int)
    regions = np.clip((10 + 60 * stream.uniform(bucket) ** 2).astype(int), 10, 100)
    order = np.argsort(words + regions, kind="stable")
    middle = order[bucket // 2 - rows // 2 :][:rows]
    return [(int(words[row]), int(regions[row])) for row in middle]


def engine_of(
    preset: str, objective: Objective, threads: int, settings: EngineConfig | None = None, **model: Any
) -> TorchEngine:
    """A model of that size in one process; `model`: further keys of a recipe's model section."""
    torch.manual_seed(0)
    module = build_module(ModelConfig(preset=preset, **model), [objective], manifest())
    settings = dataclasses.replace(settings or EngineConfig(), threads=threads)
    engine = TorchEngine(module, settings, OptimizerConfig())
    torch.set_num_threads(threads)
    return engine


def without_dropout() -> dict[str, float]:
    """Keys of the model section that switch dropout off."""
    return {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
