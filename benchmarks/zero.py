"""What each ZeRO stage sends between ranks and keeps in memory, a plain and an adversarial optimizer step apart.

    python benchmarks/zero.py --preset uniter-base --worlds 1 2 4

Every collective that DeepSpeed calls is counted, with the bytes of the tensor that a rank hands in or gets, whichever
is larger; nothing is taken from documentation. Memory is the resident set of a rank: what it holds between steps, and
the peak of an adversarial step, beside the ZeRO formula. Real ranks on this machine, over gloo.
"""

import argparse
import collections
import ctypes
import gc
import json
import time
from pathlib import Path
from typing import Any

import record
import torch
import torch.distributed
from alternating import status
from ranks import EXACT_MEMORY, run_ranks
from workload import batch_of, manifest, vqa_objective, without_dropout

from villa_ds.config import AdversaryConfig, EngineConfig, ModalityConfig, ModelConfig, OptimizerConfig
from villa_ds.train.adversary import Adversary
from villa_ds.train.ending import end
from villa_ds.train.engine import build_engine
from villa_ds.train.module import build_module
from villa_ds.train.step import StepInput, adversarial_step, train_step
from villa_ds.train.torch_engine import Engine

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


def formula(parameters: int, stage: int, world: int) -> tuple[int, int]:
    """Bytes of weights with AdamW's states, and of gradients, in float32 (Rajbhandari et al., 2020, section 5).

    From stage 1 on DeepSpeed keeps the weights that it updates apart from those that it computes with.
    """
    weights = gradients = 4 * parameters
    states = 8 * parameters + (4 * parameters if stage else 0)
    shared = {0: (1, 1, 1), 1: (1, 1, world), 2: (1, world, world), 3: (world, world, world)}[stage]
    return weights // shared[0] + states // shared[2], gradients // shared[1]


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
    settings = EngineConfig(
        name="deepspeed", ds_config=ds_config, device="cpu", threads=1, gradient_reduction=reduction
    )

    def engine_of(**sizes: int) -> Engine:
        torch.manual_seed(0)
        module = build_module(ModelConfig(preset=options.preset, **sizes, **without_dropout()), [objective], manifest())
        return build_engine(module, settings, OptimizerConfig())

    # A step of a tiny model: libraries are mapped on first use, which is no memory of a stage's.
    tiny = engine_of(hidden_size=64, num_attention_heads=2, intermediate_size=64, num_hidden_layers=1)
    train_step(tiny, StepInput(1, 0, objective, (batch_of(objective, [(3, 3)]),), (0,)))
    tiny.update(1e-5)
    del tiny
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    empty = status("VmRSS")
    engine = engine_of()
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
    result |= {"resident_between_steps": rested - empty, "resident_at_peak": peak - empty}
    if engine.rank == 0:
        print(json.dumps(result))


def measure(variant: str, world: int, options: argparse.Namespace) -> dict[str, Any]:
    """What rank 0 of the variant measures."""
    command = [__file__, "--rank-of", variant, "--preset", options.preset, "--rows", str(options.rows)]
    return run_ranks(world, *command, "--steps", *map(str, options.steps), environment=EXACT_MEMORY)


def describe(variant: str, world: int, measured: dict[str, Any]) -> list[str]:
    """Lines for the terminal."""
    lines = [
        f"{variant}, {world} ranks: {measured['resident_between_steps'] / 2**20:.0f} MiB between steps, by formula "
        f"{measured['states_by_formula'] / 2**20:.0f}; {measured['resident_at_peak'] / 2**20:.0f} at the peak, of "
        f"which gradients by formula {measured['gradients_by_formula'] / 2**20:.0f}"
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
        end(0)
    started, results = record.environment(), {}
    for variant in options.variants:
        for world in options.worlds:
            measured = measure(variant, world, options)
            stage = int(VARIANTS[variant][0][4])
            states, gradients = formula(measured["parameters"], stage, world)
            measured |= {"states_by_formula": states, "gradients_by_formula": gradients}
            results[f"{variant}, {world} ranks"] = measured
            print("\n".join(describe(variant, world, measured)), flush=True)
    content = {**started, "options": vars(options), "lanes": LANES, "results": results}
    print(f"written to {record.write(f'zero/{options.preset}', content)}")


if __name__ == "__main__":
    main()
