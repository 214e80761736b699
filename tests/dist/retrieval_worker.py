"""One rank of the hard-negative test: a plain and an adversarial optimizer step that choose their rows first.

    retrieval_worker.py ENGINE DS_CONFIG OUT

Writes the parameters' state to OUT. All M = 4 lanes are taken, whatever the number of ranks.
"""

import sys
from pathlib import Path

import torch

from tests.tiny import tiny_batch, tiny_module
from villa_ds.config import AdversaryConfig, EngineConfig, ModalityConfig, OptimizerConfig
from villa_ds.data.lanes import BatchPlan
from villa_ds.train.adversary import Adversary
from villa_ds.train.engine import build_engine
from villa_ds.train.step import StepInput, adversarial_step, train_step

NAME, LANES = "retrieval-hard", 4


def main() -> None:
    name, ds_config, out = sys.argv[1:]
    module = tiny_module(NAME, dtype=torch.float32, dropout=0.1)
    optimizer = OptimizerConfig(name="release_adamw", clip_norm=1.0, weight_decay=0.01)
    engine = build_engine(module, EngineConfig(name=name, ds_config=ds_config, device="cpu"), optimizer)
    objective = engine.module.objectives[NAME]
    lanes = BatchPlan(LANES, engine.world).lanes_of(engine.rank)
    for step, adversary in ((1, None), (2, AdversaryConfig(modality="text", text=ModalityConfig(0.7, 0.9)))):
        batches = tuple(
            tiny_batch(objective, rows=1 + lane % 2, start=100 * step + 10 * lane, dtype=torch.float32)
            for lane in lanes
        )
        work = StepInput(step, 0, objective, batches, tuple(lanes))
        if adversary is None:
            train_step(engine, work)
        else:
            adversarial_step(engine, work, Adversary(adversary), strength=1.0)
        engine.update(1e-3)
    Path(out).mkdir(parents=True, exist_ok=True)
    engine.snapshot()(Path(out))


main()
