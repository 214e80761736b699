"""`villa-ds evaluate`: metrics and predictions of a checkpoint on held-out sets."""

import dataclasses
import json
import logging
from pathlib import Path

from villa_ds.batch import Batch, LossOutput
from villa_ds.config import Recipe
from villa_ds.data.lanes import BatchPlan
from villa_ds.errors import ConfigError
from villa_ds.objectives.base import Objective
from villa_ds.train.checkpoint import read_state, resolve_checkpoint
from villa_ds.train.engine import build_engine
from villa_ds.train.evaluate import evaluate
from villa_ds.train.rundir import start_logging
from villa_ds.train.session import build_initial_module, open_data, validation_loaders

EVALUATION = "evaluation"
log = logging.getLogger("villa_ds")


def evaluate_checkpoint(recipe: Recipe, checkpoint: Path | None, limit: int = 0) -> Path:
    """Evaluate every task that has a set under `data.validation`; returns the folder written.

    `checkpoint` is a checkpoint, or a run directory for its newest one (None: the recipe's own). The run directory's
    `evaluation/step-<n>/` gets `metrics.json` and, per task, `predictions-<data>-<objective>.jsonl` sorted by id.
    Runs on the recipe's engine, so also on several ranks.
    """
    folder = resolve_checkpoint(checkpoint or recipe.run_directory)
    data = open_data(recipe)
    if not data.validation:
        raise ConfigError("data.validation: name a held-out set, such as data.validation.NAME=FOLDER")
    module = build_initial_module(dataclasses.replace(recipe, initialize=None), data)  # the checkpoint has them all
    engine = build_engine(module, recipe.engine, recipe.optimizer)
    engine.load(folder)
    start_logging(None, verbose=engine.rank == 0)
    plan = BatchPlan(recipe.data.lanes, engine.world)
    out = folder.parent.parent / EVALUATION / f"step-{read_state(folder)['step']:08d}"
    results: dict[str, dict[str, float]] = {}
    for task, (objective, loader) in validation_loaders(recipe, data, plan, engine.rank, limit).items():
        collector = _Collector(objective)
        results[task] = evaluate(engine, objective, loader, collector)
        rows = [row for share in engine.gather(collector.rows) for row in share]
        if engine.rank == 0:
            log.info("%s  %s", task, "  ".join(f"{name} {value:.4f}" for name, value in sorted(results[task].items())))
            if rows:
                out.mkdir(parents=True, exist_ok=True)
                lines = "".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: str(row["id"])))
                (out / f"predictions-{task.replace('/', '-')}.jsonl").write_text(lines, encoding="utf-8")
    if engine.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        log.info("written to %s", out)
    return out


class _Collector:
    """Keeps the predictions of one task with their ids."""

    def __init__(self, objective: Objective) -> None:
        self.rows: list[dict[str, object]] = []
        self._objective = objective

    def __call__(self, output: LossOutput, batch: Batch) -> None:
        predictions = self._objective.predictions(output, batch)
        self.rows += [{"id": name, **row} for name, row in zip(batch.ids, predictions, strict=bool(predictions))]
