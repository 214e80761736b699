"""What adversarial steps cost, in plain steps of the same model: the exact schedule beside the textbook loop.

    python benchmarks/adversarial_cost.py --preset uniter-base --rows 4 --rounds 5

Variants take turns (`alternating.py`); the figure is the median over rounds of a variant's processor time over the
plain step's of the same round, beside the ratio that counting passes gives. Gradient work only: no update, no data.
"""

import argparse
from collections.abc import Callable

import record
from alternating import alternate, peak_memory
from workload import batch_of, engine_of, vqa_objective

from villa_ds.config import AdversaryConfig, ModalityConfig
from villa_ds.train.adversary import Adversary
from villa_ds.train.step import StepInput, adversarial_step, train_step

LABELS = {
    "exact": {},
    "exact, clean graph recomputed": {"clean_graph": "recompute"},
    "exact, detached": {"clean": "detached"},
    "exact, independent masks": {"dropout": "independent"},
    "textbook (released)": {"schedule": "textbook", "dropout": "independent"},
}


def expected(steps: int, modality: str, label: str, backward: int) -> float:
    """Plain steps by counting: a forward costs 1 and a backward `backward`, of which the inputs' alone one less.

    `backward` is 2, and 3 with activation checkpointing, which runs every forward again.
    """
    k, whole = steps, 1 + backward
    branches = 2 if modality == "alternate" else 1
    perturbed = branches * (k - 1) * whole
    units = {
        "exact": whole + (backward - 1) * (k > 1) + perturbed,
        "exact, clean graph recomputed": whole + (1 + backward - 1) * (k > 1) + perturbed,
        "exact, detached": whole + perturbed,
        "exact, independent masks": whole + branches * k * whole,
        "textbook (released)": 1 + k * (branches * whole + backward),
    }
    return units[label] / whole


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="uniter-small")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--words", type=int, default=14)
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--steps", type=int, default=[3], nargs="+", help="K")
    parser.add_argument("--modalities", nargs="+", default=["text", "image", "both", "alternate"])
    parser.add_argument("--labels", nargs="+", default=list(LABELS), choices=LABELS, metavar="SCHEDULE")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    started = record.environment()
    objective = vqa_objective()
    recompute = options.activation_checkpointing
    engine = engine_of(options.preset, objective, options.threads, activation_checkpointing=recompute)
    batch = batch_of(objective, [(options.words, options.regions)] * options.rows)
    work = StepInput(1, 0, objective, (batch,), (0,))
    runs: dict[str, Callable[[], object]] = {"plain": lambda: train_step(engine, work)}
    counted = {"plain": 1.0}
    step = {"text": ModalityConfig(1e-2), "image": ModalityConfig(1e-2)}
    for steps in options.steps:
        for modality in options.modalities:
            for label in options.labels:
                config = AdversaryConfig(steps=steps, modality=modality, **step, **LABELS[label])
                name = f"K={steps} {modality}, {label}"
                runs[name] = lambda config=config: adversarial_step(engine, work, Adversary(config), 1.0)
                counted[name] = expected(steps, modality, label, 3 if recompute else 2)
    times = alternate(runs, options.rounds, before=engine.discard)
    memory = {}
    for name, run in runs.items():
        engine.discard()
        memory[name] = peak_memory(run)
    measured = {name: times.ratio(name, "plain") for name in runs}
    for name in runs:
        mebibytes = "" if memory[name] is None else f"{memory[name] / 2**20:8.0f} MiB at its peak"
        print(f"{name:50} {measured[name]:6.2f} plain steps, counted {counted[name]:5.2f} {mebibytes}")
    suffix = "-checkpointing" if recompute else ""
    name = f"adversarial_cost/{options.preset}-k{'-'.join(map(str, options.steps))}{suffix}"
    content = {**started, "options": vars(options), "ratio_to_plain_median": measured, "counted": counted}
    print(f"written to {record.write(name, {**content, 'peak_bytes': memory, **times.to_dict()})}")


if __name__ == "__main__":
    main()
