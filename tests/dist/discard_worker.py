"""One rank that takes three optimizer steps and throws others away between them.

    discard_worker.py ENGINE DS_CONFIG OUT all|kept

"kept" leaves out those that would be thrown away.
"""

import dataclasses
import sys
from pathlib import Path

import torch

from tests.tiny import tiny_batch, tiny_module
from villa_ds.config import AdversaryConfig, EngineConfig, ModalityConfig, OptimizerConfig
from villa_ds.data.lanes import BatchPlan
from villa_ds.errors import NonFiniteError
from villa_ds.train.adversary import Adversary
from villa_ds.train.ending import end
from villa_ds.train.engine import build_engine
from villa_ds.train.step import StepInput, adversarial_step, train_step

LANES = 2
ADVERSARY = Adversary(AdversaryConfig(modality="both", text=ModalityConfig(0.7, 0.9), image=ModalityConfig(0.5, 0.8)))
# (objective, adversarial, fate); "refused": by `update` itself, as when only the gradient is not finite
STEPS = (
    ("mlm", False, "kept"),
    ("itm", False, "discarded"),
    ("mrfr", True, "kept"),
    ("mlm", True, "discarded"),
    ("itm", False, "NaN, refused"),
    ("mrfr", True, "NaN, discarded"),
    ("itm", False, "kept"),
)


def main() -> None:
    name, ds_config, out, which = sys.argv[1:]
    module = tiny_module("mlm", "itm", "mrfr", dtype=torch.float32, dropout=0.1)
    engine = build_engine(
        module, EngineConfig(name=name, ds_config=ds_config, device="cpu"), OptimizerConfig(clip_norm=1.0)
    )
    lanes = tuple(BatchPlan(LANES, engine.world).lanes_of(engine.rank))
    for step, (objective_name, adversarial, fate) in enumerate(STEPS, 1):
        if fate != "kept" and which == "kept":
            continue
        objective = engine.module.objectives[objective_name]
        batches = [tiny_batch(objective, rows=3, start=100 * step + 10 * lane, dtype=torch.float32) for lane in lanes]
        if "NaN" in fate and 0 in lanes:  # one rank's only
            batches[0] = dataclasses.replace(batches[0], features=batches[0].features * float("nan"))
        work = StepInput(step, 0, objective, tuple(batches), lanes)
        if adversarial:
            adversarial_step(engine, work, ADVERSARY, strength=1.0)
        else:
            train_step(engine, work)
        if fate == "kept":
            engine.update(1e-3)
        elif "discarded" in fate:
            engine.discard()
        else:
            try:
                engine.update(1e-3)
            except NonFiniteError:
                continue
            raise AssertionError("updated with a gradient that is not finite")
    Path(out).mkdir(parents=True, exist_ok=True)
    engine.snapshot()(Path(out))


main()
end(0)
