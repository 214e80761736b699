"""What `villa-ds estimate` says of memory beside what ranks on this machine really take.

    python benchmarks/estimate_check.py --preset uniter-base

Each rank notes its resident memory before there is a model, takes two optimizer steps and notes the peak. The estimate
is of the same recipe, on the same micro-batches. Real ranks, over gloo.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
from typing import Any

import record
import torch
from alternating import status
from ranks import EXACT_MEMORY, run_ranks

from villa_ds.config import Recipe, load_recipe
from villa_ds.data.lanes import BatchPlan
from villa_ds.estimate import STAGES, assumed_data, states_of, trace
from villa_ds.resources import find_recipe
from villa_ds.train.ending import end
from villa_ds.train.engine import build_engine
from villa_ds.train.loop import take_step
from villa_ds.train.module import build_module
from villa_ds.train.step import StepInput

RUNS = (("plain PyTorch", 1), ("zero0", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2))


def recipe_of(options: argparse.Namespace, stage: str, tokens: int | None = None) -> Recipe:
    """Question answering with or without the adversary, on made-up micro-batches."""
    engine = ["engine.name=torch"] if stage == STAGES[0] else ["engine.name=deepspeed", f"engine.ds_config={stage}"]
    adversary = "{steps: 3, modality: text}" if options.adversary else "null"
    settings = [
        f"model.preset={options.preset}",
        f"data.tokens={tokens or options.tokens}",
        f"phases.0.adversary={adversary}",
    ]
    settings += ["data.lanes=4", "data.root=/nowhere", "engine.device=cpu", "engine.precision=float32"]
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    return load_recipe(find_recipe("demo-vqa"), [*settings, *engine, *(f"model.{name}=null" for name in sizes)])


def warm_up(recipe: Recipe) -> None:
    """A step of a tiny model in the same engine: libraries are mapped on first use, which is no memory of a model."""
    data, sizes = assumed_data(recipe)
    sized = dataclasses.replace(
        recipe.model, hidden_size=64, num_attention_heads=2, intermediate_size=64, num_hidden_layers=1
    )
    engine = build_engine(build_module(sized, data.objectives, data.reference), recipe.engine, recipe.optimizer)
    work = StepInput(1, 0, data.objectives[0], (sizes[0].small,), (engine.rank,))
    take_step(engine, work, recipe.phases[0], 1)
    engine.update(1e-5)
    torch.nn.functional.linear(torch.randn(512, 512), torch.randn(512, 512))


def rank_main(options: argparse.Namespace) -> None:
    """One rank: take steps, print the bytes that the model and its steps took at their peak."""
    import deepspeed  # noqa: F401, PLC0415 (its own memory is not the model's)

    recipe = recipe_of(options, options.rank_of)
    data, sizes = assumed_data(recipe)
    torch.set_num_threads(1)
    warm_up(recipe_of(options, options.rank_of, tokens=256))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    empty = status("VmRSS")
    engine = build_engine(build_module(recipe.model, data.objectives, data.reference), recipe.engine, recipe.optimizer)
    lanes = tuple(BatchPlan(recipe.data.lanes, engine.world).lanes_of(engine.rank))
    work = StepInput(1, 0, data.objectives[0], (sizes[0].large,) * len(lanes), lanes)
    for _ in range(2):
        take_step(engine, work, recipe.phases[0], 1)
        engine.update(1e-5)
    if engine.rank == 0:
        print(json.dumps({"bytes": status("VmHWM") - empty, "parameters": engine.parameters}))


def measure(options: argparse.Namespace, stage: str, ranks: int) -> dict[str, Any]:
    """What rank 0 of the stage measures."""
    command = [__file__, "--rank-of", stage, "--preset", options.preset, "--tokens", str(options.tokens)]
    return run_ranks(ranks, *command, *(["--adversary"] if options.adversary else []), environment=EXACT_MEMORY)


def main() -> None:
    """Compare every stage and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="uniter-base")
    parser.add_argument("--tokens", type=int, default=1664)
    parser.add_argument("--adversary", action="store_true")
    parser.add_argument("--stages", nargs="+", default=[stage for stage, _ in RUNS])
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        rank_main(options)
        end(0)
    started, results = record.environment(), {}
    for stage, ranks in RUNS:
        if stage not in options.stages:
            continue
        recipe = recipe_of(options, stage)
        data, sizes = assumed_data(recipe)
        found = trace(recipe, data, recipe.phases[0], 0, sizes[0].large)
        measured = measure(options, stage, ranks)
        passes = found.passes * recipe.data.lanes // ranks
        states = states_of(stage, measured["parameters"], ranks, recipe, passes)
        estimated = states.peak(found.activations)
        results[f"{stage}, {ranks} ranks"] = {"estimated": estimated, "measured": measured["bytes"]}
        print(
            f"{stage}, {ranks} ranks: estimated {estimated / 2**20:.0f} MiB, measured {measured['bytes'] / 2**20:.0f}: "
            f"{estimated / measured['bytes'] - 1:+.1%}", flush=True,
        )  # fmt: skip
    name = f"estimate/{options.preset}{'-villa' if options.adversary else ''}"
    print(f"written to {record.write(name, {**started, 'options': vars(options), 'results': results})}")


if __name__ == "__main__":
    main()
