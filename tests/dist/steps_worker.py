"""One rank that takes COUNT optimizer steps of a plan, plain and adversarial, from START on.

    steps_worker.py PLAN ENGINE DS_CONFIG[:GRADIENT_REDUCTION] OUT COUNT [LOAD START]

Writes the parameters' state to OUT (rank by rank) and prints one JSON line: each step's gradient norm, and the loss
scale after it. All M = 4 lanes are taken, whatever the number of ranks.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.tiny import tiny_batch, tiny_module
from villa_ds.config import AdversaryConfig, EngineConfig, ModalityConfig, OptimizerConfig
from villa_ds.data.lanes import BatchPlan
from villa_ds.models import products
from villa_ds.train.adversary import Adversary
from villa_ds.train.ending import end
from villa_ds.train.engine import build_engine
from villa_ds.train.step import StepInput, adversarial_step, train_step

STRONG = {"text": ModalityConfig(0.7, 0.9), "image": ModalityConfig(0.5, 0.8)}
LANES = 4
products.WORTHWHILE = 0  # oneDNN's products under ZeRO's hooks too, small as they are


@dataclass(frozen=True)
class Plan:
    """Objectives of the model, and the steps: (objective, adversary)."""

    objectives: tuple[str, ...]
    steps: tuple[tuple[str, AdversaryConfig | None], ...]
    rows: int  # of even lanes; odd ones have one more
    dropout: float = 0.1
    precision: str = "float32"
    scale_window: int = 1000  # steps without an overflow after which the loss scale of float16 grows


SCALED = tuple(
    (name, AdversaryConfig(modality="text", **STRONG) if name == "itm" else None) for name in 8 * ("mlm", "itm")
)
PLANS = {
    # Heads change from step to step, so do the numbers of passes; both schedules.
    "pretraining": Plan(
        ("mlm", "itm", "mrfr", "mrckl"),
        (
            ("mlm", AdversaryConfig(modality="both", **STRONG)),
            ("itm", AdversaryConfig(modality="alternate", clean_graph="recompute", **STRONG)),
            ("mlm", None),
            ("mrfr", AdversaryConfig(modality="image", clean="detached", **STRONG)),
            ("itm", AdversaryConfig(steps=2, objective="paper", modality="both", init="uniform", **STRONG)),
            ("mrckl", None),
            ("mlm", AdversaryConfig(steps=2, modality="text", kl_weight=0.0, init="uniform", **STRONG)),
        ),
        rows=2,
    ),
    # Choose their rows by passes of their own first.
    "retrieval": Plan(
        ("retrieval-hard",),
        (("retrieval-hard", None), ("retrieval-hard", AdversaryConfig(modality="text", text=ModalityConfig(0.7, 0.9)))),
        rows=1,
    ),
    "float16": Plan(("mlm", "itm"), SCALED, rows=2, dropout=0.0, precision="float16", scale_window=3),
    "float16 steady": Plan(("mlm", "itm"), SCALED, rows=2, dropout=0.0, precision="float16"),
}  # fmt: skip


def main() -> None:
    name, engine_name, ds_config, out, count, *load = sys.argv[1:]
    plan = PLANS[name]
    module = tiny_module(*plan.objectives, dtype=torch.float32, dropout=plan.dropout)
    optimizer = OptimizerConfig(name="release_adamw", clip_norm=1.0, weight_decay=0.01)
    ds_config, _, reduction = ds_config.partition(":")
    settings = EngineConfig(
        name=engine_name, ds_config=ds_config, device="cpu", gradient_reduction=reduction or "auto",
        precision=plan.precision,
    )  # fmt: skip
    if plan.precision == "float16":  # DeepSpeed refuses it on a CPU, which takes it
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        CPU_Accelerator.is_fp16_supported = lambda _: True
    engine = build_engine(module, settings, optimizer)
    if plan.precision == "float16":
        engine._engine.optimizer.loss_scaler.scale_window = plan.scale_window  # type: ignore[attr-defined]
    start = 0
    if load:
        engine.load(Path(load[0]))
        start = int(load[1])
    lanes = BatchPlan(LANES, engine.world).lanes_of(engine.rank)
    norms, scales = [], []
    for step, (objective_name, adversary) in list(enumerate(plan.steps, 1))[start : start + int(count)]:
        objective = engine.module.objectives[objective_name]
        batches = tuple(
            tiny_batch(objective, rows=plan.rows + lane % 2, start=100 * step + 10 * lane, dtype=torch.float32)
            for lane in lanes
        )
        work = StepInput(step, 0, objective, batches, tuple(lanes))
        if adversary is None:
            train_step(engine, work)
        else:
            adversarial_step(engine, work, Adversary(adversary), strength=1.0)
        norms.append(engine.update(1e-3))
        scales.append(engine.loss_scale)
    Path(out).mkdir(parents=True, exist_ok=True)
    engine.snapshot()(Path(out))
    print(json.dumps({"norms": norms, "scales": scales}))


main()
end(0)
