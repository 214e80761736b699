"""The story of a run in one function: open what it needs, go on where it stopped, take steps, validate, save."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from villa_ds.config import AdversaryConfig, PhaseConfig, Recipe
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.loader import StepBatches
from villa_ds.data.quarantine import Quarantine
from villa_ds.errors import NonFiniteError, PreemptedError, RolledBackError
from villa_ds.kernels import kernels_of
from villa_ds.train.adversary import Adversary
from villa_ds.train.checkpoint import CheckpointStore, read_state
from villa_ds.train.engine import build_engine, is_first_rank
from villa_ds.train.evaluate import evaluate_all
from villa_ds.train.gallery import passing_recalls
from villa_ds.train.lock import locked
from villa_ds.train.metrics import MetricsLog, Stopwatch, SumTable
from villa_ds.train.optim import learning_rate
from villa_ds.train.quarantine import QuarantineLog
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
    refuse_unequal_ranks,
    rounding_warnings,
    run_state,
    training_loader,
    validation_galleries,
    validation_loaders,
)
from villa_ds.train.signals import StopRequest
from villa_ds.train.stability import Guard
from villa_ds.train.state import read_run_state
from villa_ds.train.step import StepInput, adversarial_step, train_step
from villa_ds.train.torch_engine import Engine, together
from villa_ds.train.watch import Pulse, collective_timeout

Results = dict[str, dict[str, float]]
log = logging.getLogger("villa_ds")


def train(recipe: Recipe, allow_change: Iterable[str] = (), stop: StopRequest | None = None) -> Results:
    """Run `recipe` to its end, from the newest good checkpoint of its run directory if there is one.

    Returns the final validation: task -> metric -> value. Raises `VillaError`s for what the user can mend, and
    `PreemptedError` after saving when the run was asked to stop (`stop`: by one who watches already).
    """
    stop = stop or StopRequest().watch()
    start_logging(None, verbose=is_first_rank())
    data = open_data(recipe)
    module = build_initial_module(recipe, data)
    for line in rounding_warnings(recipe, module):
        log.info("%s", line)
    engine = build_engine(module, recipe.engine, recipe.optimizer, collective_timeout(recipe.watch.timeout_s))
    refuse_unequal_ranks(data, engine)
    plan = BatchPlan(recipe.data.lanes, engine.world)
    directory = together(engine, lambda: open_run_directory(recipe, rank=engine.rank, allow_change=allow_change))
    with locked(directory, engine), Pulse(directory, engine, recipe.watch.timeout_s) as pulse:
        store = CheckpointStore(directory, recipe.checkpoints, engine)
        guard = Guard(recipe.stability, directory, engine.rank)
        quarantine = QuarantineLog(Quarantine(data.sets, recipe.data.damage_budget), directory, engine.rank)
        finished = finished_results(directory, store, engine, recipe.total_steps)
        if finished is not None:
            log.info("finished already: %s", directory / RESULTS_NAME)
            return finished
        run = Run(recipe, data, engine, plan, directory, store, guard, quarantine, pulse, stop)
        while True:
            try:
                results = run.go_on(allow_change)
                break
            except RolledBackError:
                log.warning("rolled back to the newest checkpoint")
        if engine.rank == 0:
            write_results(directory, results)
    return results


@dataclass
class Run:
    """Takes the steps, and does what is due after each."""

    recipe: Recipe
    data: RunData
    engine: Engine
    plan: BatchPlan
    directory: Path
    store: CheckpointStore
    guard: Guard
    quarantine: QuarantineLog
    pulse: Pulse
    stop: StopRequest
    step: int = 0  # optimizer steps done
    saved: int | None = None  # steps done at the last save

    def go_on(self, allow_change: Iterable[str]) -> Results:
        """From the newest checkpoint to the end. `RolledBackError`: call this again."""
        recipe, engine, data = self.recipe, self.engine, self.data
        self.step, position = self.resume(allow_change)
        if engine.rank == 0:
            write_recipe(self.directory, recipe)
            (self.directory / RESULTS_NAME).unlink(missing_ok=True)  # of a run that had ended and goes on
        self.loader = training_loader(recipe, data, self.plan, engine.rank, position, engine.device)
        # What cannot be planned is refused now, not days on.
        validation_loaders(recipe, data, self.plan, engine.rank, 0, engine.device)
        validation_galleries(recipe, data)
        announce(recipe, engine, self.plan, self.step, self.loader.describe())
        self.metrics = MetricsLog(
            self.directory, start_step=self.step, total_steps=recipe.total_steps, every=recipe.log.every,
            tensorboard=recipe.log.tensorboard, rank=engine.rank, reduce=engine.sum_over_ranks,
        )  # fmt: skip
        with self.metrics, closing(self.loader):
            self.leave_if_asked()
            if recipe.stability.rolls_back:  # something to roll back to
                self.save()
            self.pulse.at(self.step + 1, "loading data")
            watch = Stopwatch()
            for batches in self.loader:
                self.step = step = batches.step
                self.pulse.at(step, "forward and backward")
                phase, phase_step = phase_at(recipe.phases, step)
                lanes = tuple(self.plan.lanes_of(engine.rank))
                work = StepInput(step, recipe.seed, data.objectives[batches.task], batches.batches, lanes)
                left_out = self.guard.left_out(step)
                sums = SumTable() if left_out else take_step(engine, work, phase, phase_step)
                self.pulse.at(step, "update")
                passes, rate = engine.passes, learning_rate(step, recipe.optimizer, recipe.total_steps)
                asked, due, loss, damaged = engine.agree(
                    [self.stop.asked, self.store.due(step), sums.peak_loss(), self.quarantine.has_news(batches)]
                )
                if damaged:
                    self.quarantine.add(step, batches.data, engine.gather(batches.damage))
                norm = None if left_out else self.update(rate, loss, phase.name, batches.objective)
                fields = {"step": step, "phase": phase.name, "lr": rate, "grad_norm": norm, "passes": passes}
                fields |= sample_fields(batches, recipe.log_sample_ids)
                fields |= {
                    "quarantined": self.quarantine.pairs,
                    "data_wait_s": batches.wait_seconds,
                    "seconds": watch.lap(),
                }
                self.metrics.record(fields, sums, sum(batch.tokens for batch in batches.batches))

                last = step == recipe.total_steps
                if due or last:
                    self.save()
                self.leave_if_asked(asked)
                if recipe.validation.every and step % recipe.validation.every == 0 and not last:
                    self.validate(recipe.validation.micro_batches)
                self.pulse.at(step + 1, "loading data")
                watch.lap()
            results = self.validate(0)
            self.store.finish()
        return results

    def resume(self, allow_change: Iterable[str]) -> tuple[int, Mapping[str, Any] | None]:
        """Load the newest good checkpoint; the steps done and the position in the data, (0, None) without one."""
        folder = self.store.newest_good()
        self.saved = self.store.committed
        if folder is None:
            self.quarantine.restore([])
            return 0, None
        state = read_run_state(folder)
        refuse_silent_changes(folder, state, self.recipe, self.data, self.plan, allow_change)
        self.engine.load(folder)
        self.guard.restore(state.get("stability", {}))
        self.quarantine.restore(state.get("quarantine", []))
        log.info("resumed from %s", folder)
        return int(state["step"]), state["position"]

    def update(self, rate: float, loss: float, phase: str, objective: str) -> float | None:
        """Update unless the guard says no; the gradient norm, None without an update."""
        instead = self.guard.judge(self.step, phase, objective, loss)
        if instead is None:
            try:
                return self.engine.update(rate)
            except NonFiniteError:
                instead = self.guard.nonfinite_gradient(self.step, phase, objective)
        else:
            self.engine.discard()
        if instead == "roll_back":
            raise RolledBackError
        return None

    def save(self) -> None:
        """Save the state after `step`, unless that is done."""
        if self.saved != self.step:
            self.pulse.at(self.step, "saving")
            self.metrics.flush()
            state = run_state(self.recipe, self.data, self.plan, self.step, self.loader.state())
            state |= {"stability": self.guard.state(), "quarantine": self.quarantine.state()}
            self.store.save(self.step, self.engine.snapshot(), state, hindrance=self.metrics.problem)
            self.saved = self.step

    def leave_if_asked(self, asked: float | None = None) -> None:
        """Save and raise if any rank was asked to stop; `asked`: what the ranks have agreed on already."""
        if self.engine.agree([self.stop.asked])[0] if asked is None else asked:
            if self.step:
                self.save()
            self.store.finish()
            kept = "before the first step" if self.store.committed is None else f"saved step {self.store.committed}"
            reason = self.stop.reason or "on another rank"
            raise PreemptedError(f"asked to stop ({reason}): {kept}, start again to go on")

    def validate(self, limit: int) -> Results:
        """Held-out metrics, at most `limit` micro-batches a task (0: all)."""

        def poll() -> None:
            self.pulse.at(self.step, "validating")
            self.leave_if_asked()

        loaders = validation_loaders(self.recipe, self.data, self.plan, self.engine.rank, limit, self.engine.device)
        results = evaluate_all(self.engine, loaders, poll)
        for task, (objective, gallery) in validation_galleries(self.recipe, self.data).items():
            path = self.directory / f"gallery-{task.replace('/', '-')}.npy"
            tokens = self.recipe.data.tokens
            results[task] |= passing_recalls(self.engine, objective, gallery, tokens, path, poll)
        for task, values in results.items():
            self.metrics.event(self.step, f"validation/{task}", values)
        return results


def finished_results(directory: Path, store: CheckpointStore, engine: Engine, total_steps: int) -> Results | None:
    """The results of a run that came to its end, on all ranks; None if there is something left to do."""
    results: Results | None = engine.gather(read_results(directory) if engine.rank == 0 else None)[0]
    newest = None if results is None else store.newest_good()
    return results if newest is not None and read_state(newest)["step"] == total_steps else None


def take_step(engine: Engine, work: StepInput, phase: PhaseConfig, phase_step: int) -> SumTable:
    """Accumulate the gradient of one optimizer step, with the phase's adversary if it has one."""
    if phase.adversary is None:
        return train_step(engine, work)
    strength = strength_at(phase.adversary, phase_step)
    return adversarial_step(engine, work, Adversary(phase.adversary), strength)


def phase_at(phases: Sequence[PhaseConfig], step: int) -> tuple[PhaseConfig, int]:
    """The phase that optimizer step `step` (from 1) belongs to, and its number within it (from 1)."""
    for phase in phases:
        if step <= phase.steps:
            return phase, step
        step -= phase.steps
    raise IndexError(f"the phases end {step} steps before")


def announce(recipe: Recipe, engine: Engine, plan: BatchPlan, step: int, lines: Sequence[str]) -> None:
    """The first lines of a run: what is trained, on what, in which batches."""
    name = recipe.engine.name
    log.info("%s: %.2f million parameters on %s, engine %s", recipe.name, engine.parameters / 1e6, engine.device, name)
    kernels = kernels_of(engine.device, recipe.model, recipe.engine)
    log.info("kernels: %s", "; ".join(f"{operation} {kernel}" for operation, kernel in kernels.items()))
    log.info("%s", plan.describe(recipe.data.tokens))
    for line in lines:
        log.info("%s", line)
    phases = ", then ".join(f"{phase.steps} {phase.name}" for phase in recipe.phases)
    log.info("optimizer steps %d to %d: %s", step + 1, recipe.total_steps, phases)
    for phase in recipe.phases:
        if phase.adversary is not None and strength_at(phase.adversary, phase.steps) < 1:
            share = 100 * strength_at(phase.adversary, phase.steps)
            told = "adversary.warmup_steps is %d of its %d steps: the adversary comes to %.0f%% of its size"
            log.warning(f"phase %s: {told}", phase.name, phase.adversary.warmup_steps, phase.steps, share)


def strength_at(adversary: AdversaryConfig, phase_step: int) -> float:
    """The share of its step size and bounds that the adversary has in a step of its phase, the first one being 1."""
    return min(1.0, phase_step / (adversary.warmup_steps + 1))


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
