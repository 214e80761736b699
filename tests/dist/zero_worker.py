"""One rank of the ZeRO parity test: COUNT optimizer steps of changing objectives, plain and adversarial.

    zero_worker.py ENGINE DS_CONFIG[:GRADIENT_REDUCTION] OUT COUNT [LOAD START]

Writes the parameters' state to OUT (rank by rank) and prints one JSON line of gradient norms. All M = 4 lanes are
taken, whatever the number of ranks.
"""

import json
import sys
from pathlib import Path

import torch

from tests.tiny import tiny_batch, tiny_module
from villa_ds.config import AdversaryConfig, EngineConfig, ModalityConfig, OptimizerConfig
from villa_ds.data.lanes import BatchPlan
from villa_ds.models import products
from villa_ds.train.adversary import Adversary
from villa_ds.train.engine import build_engine
from villa_ds.train.step import StepInput, adversarial_step, train_step

STRONG = {"text": ModalityConfig(0.7, 0.9), "image": ModalityConfig(0.5, 0.8)}
# (objective, adversary): heads change from step to step, so do the numbers of passes; both schedules.
STEPS = (
    ("mlm", AdversaryConfig(modality="both", **STRONG)),
    ("itm", AdversaryConfig(modality="alternate", clean_graph="recompute", **STRONG)),
    ("mlm", None),
    ("mrfr", AdversaryConfig(modality="image", clean="detached", **STRONG)),
    ("itm", AdversaryConfig(steps=2, objective="paper", modality="both", init="uniform", **STRONG)),
    ("mrckl", None),
    ("mlm", AdversaryConfig(steps=2, modality="text", kl_weight=0.0, init="uniform", **STRONG)),
)
LANES = 4
products.WORTHWHILE = 0  # oneDNN's products under ZeRO's hooks too, small as they are


def main() -> None:
    name, ds_config, out, count, *load = sys.argv[1:]
    module = tiny_module("mlm", "itm", "mrfr", "mrckl", dtype=torch.float32, dropout=0.1)
    optimizer = OptimizerConfig(name="release_adamw", clip_norm=1.0, weight_decay=0.01)
    ds_config, _, reduction = ds_config.partition(":")
    settings = EngineConfig(name=name, ds_config=ds_config, device="cpu", gradient_reduction=reduction or "auto")
    engine = build_engine(module, settings, optimizer)
    start = 0
    if load:
        engine.load(Path(load[0]))
        start = int(load[1])
    lanes = BatchPlan(LANES, engine.world).lanes_of(engine.rank)
    norms = []
    for step, (objective_name, adversary) in list(enumerate(STEPS, 1))[start : start + int(count)]:
        objective = engine.module.objectives[objective_name]
        batches = tuple(
            tiny_batch(objective, rows=2 + lane % 2, start=100 * step + 10 * lane, dtype=torch.float32)
            for lane in lanes
        )
        work = StepInput(step, 0, objective, batches, tuple(lanes))
        if adversary is None:
            train_step(engine, work)
        else:
            adversarial_step(engine, work, Adversary(adversary), strength=1.0)
        norms.append(engine.update(1e-3))
    Path(out).mkdir(parents=True, exist_ok=True)
    engine.snapshot()(Path(out))
    print(json.dumps(norms))


main()
