"""`villa-ds compare`: the held-out results of several runs in one table, beside the trivial baseline."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from villa_ds.errors import ConfigError
from villa_ds.train.evaluate import MAJORITY
from villa_ds.train.rundir import EVALUATION, RESULTS_NAME

ACCURACIES = ("accuracy", "score")  # what the majority baseline is comparable with
HEADER = ("run", "task", "loss", "accuracy", "majority baseline")


def compare(runs: Sequence[Path]) -> str:
    """One line for each run and task: loss, accuracy, and the accuracy of always giving the commonest answer.

    A run's newest `villa-ds evaluate` counts; without one, the validation at its end.
    """
    rows = [HEADER, *(row for run in runs for row in results_of(run.name, run))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def results_of(label: str, run: Path) -> Iterable[tuple[str, ...]]:
    """The rows of one run directory under `HEADER`. ConfigError if it has no results."""
    for task, values in _results(run).items():
        accuracy = next((values[name] for name in ACCURACIES if name in values), None)
        yield label, task, _number(values.get("loss")), _number(accuracy), _number(values.get(MAJORITY))


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
