"""The story of a run in one function: open what it needs, go on where it stopped, take steps, validate, save."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from villa_ds.config import PhaseConfig, Recipe
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.loader import StepBatches
from villa_ds.errors import NonFiniteError, PreemptedError
from villa_ds.train.adversary import Adversary
from villa_ds.train.checkpoint import CheckpointStore, read_state
from villa_ds.train.engine import build_engine, is_first_rank
from villa_ds.train.evaluate import evaluate_all
from villa_ds.train.lock import locked
from villa_ds.train.metrics import MetricsLog, Stopwatch, SumTable
from villa_ds.train.optim import learning_rate
from villa_ds.train.rundir import (
    RESULTS_NAME,
    open_run_directory,
    read_results,
    start_logging,
    write_recipe,
    write_results,
)
from villa_ds.train.session import (
    RunData,
    build_initial_module,
    open_data,
    refuse_silent_changes,
    rounding_warnings,
    run_state,
    training_loader,
    validation_loaders,
)
from villa_ds.train.signals import StopRequest
from villa_ds.train.stability import Guard, RolledBackError
from villa_ds.train.step import StepInput, adversarial_step, train_step
from villa_ds.train.torch_engine import Engine

Results = dict[str, dict[str, float]]
log = logging.getLogger("villa_ds")


def train(recipe: Recipe, allow_change: Iterable[str] = ()) -> Results:
    """Run `recipe` to its end, from the newest good checkpoint of its run directory if there is one.

    Returns the final validation: task -> metric -> value. Raises `VillaError`s for what the user can mend, and
    `PreemptedError` after saving when the run was asked to stop.
    """
    stop = StopRequest()
    stop.watch()
    start_logging(None, verbose=is_first_rank())
    data = open_data(recipe)
    module = build_initial_module(recipe, data)
    for line in rounding_warnings(recipe, module):
        log.info("%s", line)
    engine = build_engine(module, recipe.engine, recipe.optimizer)
    plan = BatchPlan(recipe.data.lanes, engine.world)
    directory = open_run_directory(recipe, rank=engine.rank, allow_change=allow_change)
    with locked(directory, engine):
        store = CheckpointStore(directory, recipe.checkpoints, engine)
        guard = Guard(recipe.stability, directory, engine.rank)
        if recipe.stability.rolls_back and store.newest_good() is None:  # something to roll back to
            loader = training_loader(recipe, data, plan, engine.rank, None)
            store.save(0, engine.snapshot(), run_state(recipe, data, plan, 0, loader.state()))
        finished = finished_results(directory, store, engine, recipe.total_steps)
        if finished is not None:
            log.info("finished already: %s", directory / RESULTS_NAME)
            return finished
        while True:
            try:
                results = run(recipe, data, engine, plan, directory, store, guard, stop, allow_change)
                break
            except RolledBackError:
                log.warning("rolled back to the newest checkpoint")
        if engine.rank == 0:
            write_results(directory, results)
    return results


def run(
    recipe: Recipe, data: RunData, engine: Engine, plan: BatchPlan, directory: Path, store: CheckpointStore,
    guard: Guard, stop: StopRequest, allow_change: Iterable[str],
) -> Results:  # fmt: skip
    """From the newest checkpoint to the end: steps, and what is due after each. `RolledBackError`: start this again."""
    step, position = resume(engine, store, data, plan, allow_change)
    if engine.rank == 0:
        write_recipe(directory, recipe)
        (directory / RESULTS_NAME).unlink(missing_ok=True)  # of a run that had ended and goes on
    loader = training_loader(recipe, data, plan, engine.rank, position)
    announce(recipe, engine, plan, step, loader.describe())
    metrics = MetricsLog(
        directory, start_step=step, total_steps=recipe.total_steps, every=recipe.log.every,
        tensorboard=recipe.log.tensorboard, rank=engine.rank, reduce=engine.sum_over_ranks,
    )  # fmt: skip
    saved = step

    def save() -> None:
        nonlocal saved
        if saved != step:
            metrics.flush()
            store.save(step, engine.snapshot(), run_state(recipe, data, plan, step, loader.state()))
            saved = step

    def leave_if_asked(asked: float | None = None) -> None:
        if engine.agree([stop.asked])[0] if asked is None else asked:
            save()
            store.finish()
            reason = stop.reason or "on another rank"
            raise PreemptedError(f"asked to stop ({reason}): saved step {step}, start again to go on")

    def validate(limit: int) -> Results:
        results = evaluate_all(engine, validation_loaders(recipe, data, plan, engine.rank, limit), leave_if_asked)
        for task, values in results.items():
            metrics.event(step, f"validation/{task}", values)
        return results

    with closing(metrics), closing(loader):
        leave_if_asked()
        watch = Stopwatch()
        for batches in loader:
            step = batches.step
            phase, phase_step = phase_at(recipe.phases, step)
            lanes = tuple(plan.lanes_of(engine.rank))
            work = StepInput(step, recipe.seed, data.objectives[batches.task], batches.batches, lanes)
            left_out = guard.left_out(step)
            sums = SumTable() if left_out else take_step(engine, work, phase, phase_step)
            passes, rate = engine.passes, learning_rate(step, recipe.optimizer, recipe.total_steps)
            asked, due, loss = engine.agree([stop.asked, store.due(step), sums.worst("loss")])
            grad_norm = None if left_out else update(engine, guard, rate, loss, step, phase.name, batches.objective)
            fields = {"step": step, "phase": phase.name, "lr": rate, "grad_norm": grad_norm, "passes": passes}
            fields |= sample_fields(batches, recipe.log_sample_ids)
            fields |= {"data_wait_s": batches.wait_seconds, "seconds": watch.lap()}
            metrics.record(fields, sums, sum(batch.tokens for batch in batches.batches))

            last = step == recipe.total_steps
            if due or last:
                save()
            leave_if_asked(asked)
            if recipe.validation.every and step % recipe.validation.every == 0 and not last:
                validate(recipe.validation.micro_batches)
            watch.lap()
        results = validate(0)
        store.finish()
    return results


def finished_results(directory: Path, store: CheckpointStore, engine: Engine, total_steps: int) -> Results | None:
    """The results of a run that came to its end, on all ranks; None if there is something left to do."""
    newest = store.newest_good()
    results = read_results(directory) if engine.rank == 0 else None
    results = engine.gather(results)[0]
    return results if newest is not None and read_state(newest)["step"] == total_steps else None


def update(
    engine: Engine, guard: Guard, rate: float, loss: float, step: int, phase: str, objective: str
) -> float | None:
    """Update unless the guard says no; the gradient norm, None without an update."""
    if not guard.judge(step, phase, objective, loss):
        engine.discard()
        return None
    try:
        return engine.update(rate)
    except NonFiniteError:
        guard.nonfinite_gradient(step, phase, objective)
        return None


def take_step(engine: Engine, work: StepInput, phase: PhaseConfig, phase_step: int) -> SumTable:
    """Accumulate the gradient of one optimizer step, with the phase's adversary if it has one."""
    if phase.adversary is None:
        return train_step(engine, work)
    strength = min(1.0, phase_step / (phase.adversary.warmup_steps + 1))
    return adversarial_step(engine, work, Adversary(phase.adversary), strength)


def phase_at(phases: Sequence[PhaseConfig], step: int) -> tuple[PhaseConfig, int]:
    """The phase that optimizer step `step` (from 1) belongs to, and its number within it (from 1)."""
    for phase in phases:
        if step <= phase.steps:
            return phase, step
        step -= phase.steps
    raise IndexError(f"the phases end {step} steps before")


def resume(
    engine: Engine, store: CheckpointStore, data: RunData, plan: BatchPlan, allow_change: Iterable[str]
) -> tuple[int, Mapping[str, Any] | None]:
    """Load the newest good checkpoint; returns the steps done and the position in the data, (0, None) without one."""
    folder = store.newest_good()
    if folder is None:
        return 0, None
    state = read_state(folder)
    refuse_silent_changes(folder, state, data, plan, allow_change)
    engine.load(folder)
    log.info("resumed from %s", folder)
    return int(state["step"]), state["position"]


def announce(recipe: Recipe, engine: Engine, plan: BatchPlan, step: int, lines: Sequence[str]) -> None:
    """The first lines of a run: what is trained, on what, in which batches."""
    name = recipe.engine.name
    log.info("%s: %.2f million parameters on %s, engine %s", recipe.name, engine.parameters / 1e6, engine.device, name)
    log.info("%s", plan.describe(recipe.data.tokens))
    for line in lines:
        log.info("%s", line)
    phases = ", then ".join(f"{phase.steps} {phase.name}" for phase in recipe.phases)
    log.info("optimizer steps %d to %d: %s", step + 1, recipe.total_steps, phases)


def sample_fields(batches: StepBatches, with_ids: bool) -> dict[str, Any]:
    """What a metrics line says of the step's samples, of all lanes in order: every rank and world size agree."""
    ids = [list(micro.ids) for micro in batches.micro_batches]
    epochs = [micro.epoch for micro in batches.micro_batches]
    fields: dict[str, Any] = {
        "epoch": epochs[0],
        "data": batches.data,
        "objective": batches.objective,
        "samples": sum(map(len, ids)),
        "sample_digest": hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16],
    }
    # A step may run across an epoch's end, so ids come with the epoch of each micro-batch.
    return fields | ({"sample_ids": ids, "sample_epochs": epochs} if with_ids else {})
