"""What each ZeRO stage sends between ranks and keeps in memory, a plain and an adversarial optimizer step apart.

    python benchmarks/zero.py --preset uniter-base --worlds 1 2 4

Every collective that DeepSpeed calls is counted, with the bytes of the tensor that a rank hands in or gets, whichever
is larger; nothing is taken from documentation. Memory is the resident set of a rank: what the engine adds at start, and
the peak of an adversarial step, beside the ZeRO formula for states. Real ranks on this machine, over gloo.
"""

import argparse
import collections
import ctypes
import json
import time
from pathlib import Path
from typing import Any

import record
import torch
import torch.distributed
from alternating import status
from ranks import run_ranks
from workload import batch_of, manifest, vqa_objective, without_dropout

from villa_ds.config import AdversaryConfig, EngineConfig, ModalityConfig, ModelConfig, OptimizerConfig
from villa_ds.train.adversary import Adversary
from villa_ds.train.engine import build_engine
from villa_ds.train.module import build_module
from villa_ds.train.step import StepInput, adversarial_step, train_step

COLLECTIVES = (
    "all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter", "all_gather_into_tensor", "all_gather",
    "broadcast", "all_to_all_single",
)  # fmt: skip
LANES = 4
VARIANTS = {
    "zero0": ("zero0", "auto"),
    "zero1": ("zero1", "auto"),
    "zero2": ("zero2", "once"),
    "zero2, every pass": ("zero2", "every_pass"),
    "zero3": ("zero3", "every_pass"),
    "zero3, once": ("zero3", "once"),
    "zero3_offload": ("zero3_offload", "every_pass"),
}


class Counter:
    """Counts the calls of torch.distributed's collectives and their bytes."""

    def __init__(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()
        for name in COLLECTIVES:
            setattr(torch.distributed, name, self._counted(name, getattr(torch.distributed, name)))

    def _counted(self, name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
            lists = [sum(t.nbytes for t in each) for each in args if isinstance(each, list)]
            self.calls[name] += 1
            self.bytes[name] += max([each.nbytes for each in tensors] + lists)
            return function(*args, **kwargs)

        return run

    def take(self) -> dict[str, dict[str, int]]:
        """Counts since the last time, and start anew."""
        taken = {"calls": dict(self.calls), "bytes": dict(self.bytes)}
        self.calls.clear()
        self.bytes.clear()
        return taken


def formula(parameters: int, stage: int, world: int) -> int:
    """Bytes of weights, gradients and AdamW's states in float32 (Rajbhandari et al., 2020, section 5).

    From stage 1 on DeepSpeed keeps the weights that it updates apart from those that it computes with.
    """
    weights = gradients = 4 * parameters
    states = 8 * parameters + (4 * parameters if stage else 0)
    shared = {0: (1, 1, 1), 1: (1, 1, world), 2: (1, world, world), 3: (world, world, world)}[stage]
    return sum(size // share for size, share in zip((weights, gradients, states), shared, strict=True))


def peak_of(run: Any) -> tuple[int, int]:
    """Resident bytes before and at the peak of `run`."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status("VmRSS")
    run()
    return before, status("VmHWM")


def rank_main(options: argparse.Namespace) -> None:
    """One rank: measure, and print one JSON line."""
    import deepspeed  # noqa: F401, PLC0415 (its own memory is not the engine's)

    counter = Counter()
    ds_config, reduction = VARIANTS[options.rank_of]
    objective = vqa_objective()
    torch.manual_seed(0)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    empty = status("VmRSS")
    module = build_module(ModelConfig(preset=options.preset, **without_dropout()), [objective], manifest())
    settings = EngineConfig(
        name="deepspeed", ds_config=ds_config, device="cpu", threads=1, gradient_reduction=reduction
    )
    engine = build_engine(module, settings, OptimizerConfig())
    world = engine.world
    share = LANES // world
    lanes = tuple(range(engine.rank * share, (engine.rank + 1) * share))
    batches = tuple(batch_of(objective, [(options.words, options.regions)] * options.rows) for _ in lanes)
    work = StepInput(1, 0, objective, batches, lanes)
    step = {"text": ModalityConfig(1e-3), "image": ModalityConfig(1e-3)}

    def optimizer_step(steps: int) -> None:
        if steps:
            adversarial_step(engine, work, Adversary(AdversaryConfig(steps=steps, **step)), 1.0)
        else:
            train_step(engine, work)
        engine.update(1e-5)

    optimizer_step(0)
    result: dict[str, Any] = {"parameters": engine.parameters, "collectives": {}, "seconds": {}}
    for steps in (0, *options.steps):
        counter.take()
        started = time.perf_counter()
        optimizer_step(steps)
        result["seconds"][f"K={steps}" if steps else "plain"] = time.perf_counter() - started
        result["collectives"][f"K={steps}" if steps else "plain"] = counter.take()
    rested, peak = peak_of(lambda: optimizer_step(options.steps[0]))
    result |= {"resident_after_start": rested - empty, "resident_at_peak": peak - empty}
    if engine.rank == 0:
        print(json.dumps(result))


def measure(variant: str, world: int, options: argparse.Namespace) -> dict[str, Any]:
    """What rank 0 of the variant measures."""
    command = [__file__, "--rank-of", variant, "--preset", options.preset, "--rows", str(options.rows)]
    return run_ranks(world, *command, "--steps", *map(str, options.steps))


def describe(variant: str, world: int, measured: dict[str, Any]) -> list[str]:
    """Lines for the terminal."""
    stage = int(VARIANTS[variant][0][4])
    states = formula(measured["parameters"], stage, world)
    lines = [
        f"{variant}, {world} ranks: resident {measured['resident_after_start'] / 2**20:.0f} MiB after start, "
        f"{measured['resident_at_peak'] / 2**20:.0f} at the peak; states by formula {states / 2**20:.0f} MiB"
    ]
    for step, counts in measured["collectives"].items():
        calls = ", ".join(
            f"{number} {name} {counts['bytes'][name] / 2**20:.1f} MiB" for name, number in counts["calls"].items()
        )
        lines.append(f"    {step}: {calls or 'nothing'}; {measured['seconds'][step]:.2f} s")
    return lines


def main() -> None:
    """Measure every variant with every number of ranks and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="uniter-small")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--words", type=int, default=14)
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 5], help="K of the adversarial steps")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        rank_main(options)
        return
    started, results = record.environment(), {}
    for variant in options.variants:
        for world in options.worlds:
            measured = measure(variant, world, options)
            stage = int(VARIANTS[variant][0][4])
            measured["states_by_formula"] = formula(measured["parameters"], stage, world)
            results[f"{variant}, {world} ranks"] = measured
            print("\n".join(describe(variant, world, measured)), flush=True)
    content = {**started, "options": vars(options), "lanes": LANES, "results": results}
    print(f"written to {record.write(f'zero/{options.preset}', content)}")


if __name__ == "__main__":
    main()
