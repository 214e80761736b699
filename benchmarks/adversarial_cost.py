"""What adversarial steps cost, in plain steps of the same model: the exact schedule beside the textbook loop.

    python benchmarks/adversarial_cost.py --preset uniter-base --rows 4 --rounds 5

Every round runs each variant once, in turn, so that a machine whose speed drifts slows all alike; the figure is the
median over rounds of a variant's time over the plain step's time *of the same round*. Gradient work only: no update, no
data.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import record
import torch

from villa_ds.batch import Batch, ImageSpan, Regions, Sample
from villa_ds.config import AdversaryConfig, EngineConfig, ModalityConfig, ModelConfig, OptimizerConfig
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.collate import collate
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.data.store import LocalStore
from villa_ds.objectives.base import Objective, build_objective
from villa_ds.rng import Stream
from villa_ds.train.adversary import Adversary
from villa_ds.train.module import build_module
from villa_ds.train.step import StepInput, adversarial_step, train_step
from villa_ds.train.torch_engine import TorchEngine

ANSWERS, WIDTH = 3129, 2048


def manifest() -> Manifest:
    """Sizes of VQA v2 with bottom-up features; there are no shards behind it."""
    vocabulary = Vocabulary(size=28996, sha256="", pad=0, unk=100, cls=101, sep=102, mask=103, random_low=106)
    return Manifest(
        store=LocalStore(record.RESULTS), shards=(), feature_width=WIDTH, detector_classes=0, label_format="none",
        vocabulary=vocabulary, answers=(), extractor="", source="", command="", fingerprint="", index_files={},
    )  # fmt: skip


def random_batch(objective: Objective, rows: int, words: int, regions: int) -> Batch:
    """Rows of equal length, so that no figure depends on padding."""
    examples = []
    for row in range(rows):
        stream = Stream("benchmark", row)
        features = (stream.uniform(regions * WIDTH).reshape(regions, WIDTH) * 2).astype(np.float16)
        boxes = stream.uniform(regions * 7).reshape(regions, 7).astype(np.float32)
        pieces = (1000 + stream.integers(words, 20000)).astype(np.int32)
        image = Regions(features, boxes, None, (ImageSpan("image", 0, regions),))
        examples.append(objective.prepare(Sample(str(row), pieces, image, {"labels": [row], "scores": [1.0]}), stream))
    return collate(examples, objective.reads)


def variants(steps: int) -> dict[str, AdversaryConfig]:
    """Every modality, clean joint and detached, masks shared and independent, both schedules."""
    step = {"text": ModalityConfig(1e-2), "image": ModalityConfig(1e-2)}
    configs = {}
    for modality in ("text", "image", "both", "alternate"):
        for label, settings in {
            "exact": {},
            "exact, detached": {"clean": "detached"},
            "exact, independent masks": {"dropout": "independent"},
            "textbook (released)": {"schedule": "textbook", "dropout": "independent"},
        }.items():
            configs[f"{modality}, {label}"] = AdversaryConfig(steps=steps, modality=modality, **step, **settings)
    return configs


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="uniter-small")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--words", type=int, default=14)
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--steps", type=int, default=3, help="K")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    started = record.environment()
    settings = ObjectivesConfig()
    objective = build_objective("vqa", ObjectivesConfig(vqa=type(settings.vqa)(num_answers=ANSWERS)), manifest())
    torch.manual_seed(0)
    module = build_module(ModelConfig(preset=options.preset), [objective], manifest())
    engine = TorchEngine(module, EngineConfig(threads=options.threads), OptimizerConfig())
    torch.set_num_threads(options.threads)
    batch = random_batch(objective, options.rows, options.words, options.regions)
    work = StepInput(1, 0, objective, (batch,), (0,))

    def timed(run: Callable[[], object]) -> float:
        engine.discard()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    runs: dict[str, Callable[[], object]] = {"plain": lambda: train_step(engine, work)}
    for name, config in variants(options.steps).items():
        runs[name] = lambda config=config: adversarial_step(engine, work, Adversary(config), 1.0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        for name, run in runs.items():
            elapsed = timed(run)
            if number:  # the first round warms up
                seconds[name].append(elapsed)
    ratios = {
        name: statistics.median(value / plain for value, plain in zip(values, seconds["plain"], strict=True))
        for name, values in seconds.items()
    }
    for name, ratio in ratios.items():
        print(f"{name:40} {statistics.median(seconds[name]):8.3f} s  {ratio:6.2f} plain steps")
    name = f"adversarial_cost/{options.preset}-k{options.steps}"
    content = {**started, "options": vars(options), "ratio_to_plain_median": ratios, "seconds": seconds}
    print(f"written to {record.write(name, content)}")


if __name__ == "__main__":
    main()
