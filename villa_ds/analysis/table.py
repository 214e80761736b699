"""`villa-ds compare`: the held-out results of several runs in one table, beside the trivial baseline."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from villa_ds.errors import ConfigError
from villa_ds.train.evaluate import MAJORITY
from villa_ds.train.gallery import MEAN_RECALL
from villa_ds.train.rundir import EVALUATION, RESULTS_NAME

ACCURACIES = ("accuracy", "score")  # what the majority baseline is comparable with


def compare(runs: Sequence[Path]) -> str:
    """One line for each run and task: loss, accuracy, and the accuracy of always giving the commonest answer.

    A run's newest `villa-ds evaluate` counts; without one, the validation at its end.
    """
    header, cells = cells_of([row for run in runs for row in results_of(run.name, run)])
    rows = [header, *cells]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Result:
    """What a run scores in one task; None where it does not tell."""

    run: str
    task: str
    loss: float | None
    accuracy: float | None
    majority_baseline: float | None
    mean_recall: float | None = None  # of a ranked gallery


def results_of(label: str, run: Path, *, required: bool = True) -> Iterable[Result]:
    """The results of one run directory. ConfigError if it has none and they are `required`."""
    try:
        results = _results(run)
    except ConfigError:
        if required:
            raise
        return
    for task, values in results.items():
        accuracy = next((values[name] for name in ACCURACIES if name in values), None)
        yield Result(label, task, values.get("loss"), accuracy, values.get(MAJORITY), values.get(MEAN_RECALL))


def cells_of(results: Sequence[Result]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table; recall has a column where a result has any."""
    header: tuple[str, ...] = ("run", "task", "loss", "accuracy", "majority baseline")
    rows = [(row.run, row.task, *map(_number, (row.loss, row.accuracy, row.majority_baseline))) for row in results]
    if all(row.mean_recall is None for row in results):
        return header, rows
    return (*header, "mean recall"), [
        (*cells, _number(row.mean_recall)) for cells, row in zip(rows, results, strict=True)
    ]


def _results(run: Path) -> dict[str, dict[str, float]]:
    evaluations = sorted((run / EVALUATION).glob("step-*/metrics.json"))
    path = evaluations[-1] if evaluations else run / RESULTS_NAME
    try:
        results: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no results of a finished run: {error}") from None
    return results


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
