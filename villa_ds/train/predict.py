"""`villa-ds evaluate`: metrics and predictions of a checkpoint, or of several together, on held-out sets."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from villa_ds.batch import Batch, LossOutput
from villa_ds.config import Recipe
from villa_ds.data.lanes import BatchPlan
from villa_ds.errors import ConfigError
from villa_ds.files import replace_file
from villa_ds.objectives.base import UNLABELLED, Objective
from villa_ds.objectives.retrieval import ImageTextRetrieval
from villa_ds.train.checkpoint import MANIFEST, read_state, resolve_checkpoint
from villa_ds.train.engine import build_engine, is_one_of_several
from villa_ds.train.ensemble import load_ensemble
from villa_ds.train.evaluate import Tally, evaluate
from villa_ds.train.gallery import Gallery, recalls_of, score_gallery
from villa_ds.train.rundir import EVALUATION, start_logging
from villa_ds.train.session import RunData, build_initial_module, open_data, refuse_unequal_ranks, validation_loaders

Results = dict[str, dict[str, float]]
log = logging.getLogger("villa_ds")


def evaluate_checkpoint(recipe: Recipe, checkpoint: Path | None, limit: int = 0, *, initial: bool = False) -> Path:
    """Evaluate every task that has a set under `data.validation`; returns the folder written.

    `checkpoint` is a checkpoint, or a run directory for its newest one (None: the recipe's own). The run directory's
    `evaluation/step-<n>/` gets `metrics.json` and, per task, `predictions-<data>-<objective>.jsonl` sorted by id,
    `submission-...` in the form of the task's evaluation server, and `scores-....npy`, retrieval's score of every text
    for every image (not with a `limit` on micro-batches). `initial`: instead of a checkpoint the model before its first
    step, as the recipe's `initialize` makes it; the folder is `evaluation/initial/` of the recipe's run. Runs on the
    recipe's engine, so also on several ranks.
    """
    folder = None if initial else resolve_checkpoint(checkpoint or recipe.run_directory)
    data = _held_out(recipe)
    if folder is not None:
        recipe = dataclasses.replace(recipe, initialize=None)  # the checkpoint has all weights
    engine = build_engine(build_initial_module(recipe, data), recipe.engine, recipe.optimizer)
    refuse_unequal_ranks(data, engine)
    if folder is None:
        out = recipe.run_directory / EVALUATION / "initial"
    else:
        engine.load(folder)
        out = folder.parent.parent / EVALUATION / f"step-{read_state(folder)['step']:08d}"
    start_logging(None, verbose=engine.rank == 0)
    plan = BatchPlan(recipe.data.lanes, engine.world)
    results: Results = {}
    for task, (objective, loader) in validation_loaders(recipe, data, plan, engine.rank, limit, engine.device).items():
        collector = Collector(objective)
        results[task] = evaluate(engine, objective, loader, collector)
        rows = [row for share in engine.gather(collector.rows) for row in share]
        results[task] |= objective.summary([row for row in rows if UNLABELLED not in row])
        if isinstance(objective, ImageTextRetrieval) and not limit:
            gallery, scores = Gallery(data.validation[task.partition("/")[0]]), _scores_path(out, task)
            score_gallery(engine, objective, gallery, recipe.data.tokens, [scores])
            results[task] |= recalls_of(scores, gallery)
        if engine.rank == 0:
            log.info("%s  %s", task, told(results[task]))
            _write_predictions(out, task, objective, rows)
    if engine.rank == 0:
        _write_metrics(out / "metrics.json", results)
        log.info("written to %s", out)
    return out


def evaluate_ensemble(recipe: Recipe, checkpoints: Sequence[Path], limit: int = 0) -> Path:
    """Evaluate the mean of several checkpoints' answers (see `train.ensemble`), and each of them beside it.

    As `evaluate_checkpoint`, in one process, into `evaluation/ensemble-<hash of the members>/` of the recipe's run
    directory; `members.json` there has the metrics of each: checkpoint -> task -> metric.
    """
    if is_one_of_several():
        raise ConfigError("checkpoint: an ensemble is evaluated in one process; start it without a launcher")
    folders = [resolve_checkpoint(path) for path in checkpoints]
    start_logging(None, verbose=True)
    digest = hashlib.sha256(b"".join(sorted((folder / MANIFEST).read_bytes() for folder in folders)))
    if len({(folder / MANIFEST).read_bytes() for folder in folders}) < len(folders):
        raise ConfigError(f"checkpoint: {', '.join(map(str, folders))}: the same checkpoint twice")
    data = _held_out(recipe)
    ensemble = load_ensemble(recipe.model, data.objectives, data.reference, recipe.engine, folders)
    out = recipe.run_directory / EVALUATION / f"ensemble-{digest.hexdigest()[:8]}"
    results: Results = {}
    members: dict[str, Results] = {str(folder): {} for folder in folders}
    plan = BatchPlan(recipe.data.lanes, 1)
    for task, (objective, loader) in validation_loaders(recipe, data, plan, 0, limit, ensemble.device).items():
        collector, tallies = Collector(objective), [Tally(objective) for _ in folders]

        def observe(output: LossOutput, batch: Batch, seen: Collector = collector, own: list[Tally] = tallies) -> None:
            seen(output, batch)
            for tally, alone in zip(own, ensemble.own, strict=True):
                tally.add(alone, batch)

        results[task] = evaluate(ensemble, objective, loader, observe)
        for name, tally in zip(members, tallies, strict=True):
            members[name][task] = tally.results(ensemble.sum_over_ranks)
        results[task] |= objective.summary([row for row in collector.rows if UNLABELLED not in row])
        if isinstance(objective, ImageTextRetrieval) and not limit:
            gallery = Gallery(data.validation[task.partition("/")[0]])
            paths = [_scores_path(out, task, member) for member in ("", *map(str, range(1, len(folders) + 1)))]
            score_gallery(ensemble, objective, gallery, recipe.data.tokens, paths, lambda: ensemble.own)
            for own, path in zip((results, *members.values()), paths, strict=True):
                own[task] |= recalls_of(path, gallery)
        for name, own in members.items():
            log.info("%s  %s  %s", task, name, told(own[task]))
        log.info("%s  together  %s", task, told(results[task]))
        _write_predictions(out, task, objective, collector.rows)
    _write_metrics(out / "members.json", members)
    _write_metrics(out / "metrics.json", results)
    log.info("written to %s", out)
    return out


def _held_out(recipe: Recipe) -> RunData:
    data = open_data(recipe)
    if not data.validation:
        raise ConfigError("data.validation: name a held-out set, such as data.validation.NAME=FOLDER")
    return data


def _scores_path(out: Path, task: str, member: str = "") -> Path:
    """Where the scores of a gallery go; `member` numbers the members of an ensemble, from 1."""
    return out / f"scores-{task.replace('/', '-')}{member and f'-member-{member}'}.npy"


def told(metrics: Mapping[str, float]) -> str:
    """Metrics on one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))


def _write_predictions(out: Path, task: str, objective: Objective, rows: Sequence[Mapping[str, object]]) -> None:
    if not rows:
        return
    out.mkdir(parents=True, exist_ok=True)
    rows, name = sorted(rows, key=lambda row: str(row["id"])), task.replace("/", "-")
    replace_file(out / f"predictions-{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    submission = objective.submission(rows)
    if submission is not None:
        replace_file(out / f"submission-{name}{submission[0]}", submission[1].encode())


def _write_metrics(path: Path, metrics: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(metrics, indent=1) + "\n").encode())


class Collector:
    """Keeps the predictions of one task with their ids."""

    def __init__(self, objective: Objective) -> None:
        self.rows: list[dict[str, object]] = []
        self._objective = objective

    def __call__(self, output: LossOutput, batch: Batch) -> None:
        """Keep what is predicted for a batch."""
        predictions = self._objective.predictions(output, batch)
        notes = batch.notes or ({},) * len(batch.ids)
        for name, row, note in zip(batch.ids, predictions, notes, strict=bool(predictions)):
            self.rows.append({"id": name, **row, **({UNLABELLED: True} if UNLABELLED in note else {})})
