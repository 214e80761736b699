"""The run directory: one recipe, one log, one series of metrics and checkpoints.

A directory that holds another recipe's run is refused, with the differences; what never changes a run's numbers may
differ.
"""

import contextlib
import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from villa_ds.config import Recipe, dump
from villa_ds.errors import CheckpointError, ConfigError
from villa_ds.files import replace_file, unfinished
from villa_ds.mapping import from_mapping, to_mapping
from villa_ds.train.checkpoint import FOLDER
from villa_ds.train.metrics import METRICS_NAME

RECIPE_NAME, LOG_NAME, RESULTS_NAME, LOCK_NAME = "config.yaml", "log.txt", "results.json", "lock"
EVALUATION = "evaluation"  # a folder for what `villa-ds evaluate` writes
_SHOWN, _SHOWN_LENGTH = 6, 600  # differences that a refusal names, and characters of each

# Dotted keys that may differ when a run goes on: where and how it runs, not what it computes.
FREE_KEYS = (
    "output",
    "data.root",
    "data.validation",
    "data.workers",
    "data.prefetch",
    "data.damage_budget",
    "data.verify",
    "data.cache",
    "data.cache_gib",
    "data.fetch_ahead",
    "data.retries",
    "data.timeout_s",
    "engine",
    "validation",
    "checkpoints",
    "watch",
    "log",
    "log_sample_ids",
    "model.fused_layer_norm",
    "model.onednn",
    "model.activation_checkpointing",
)


def open_run_directory(recipe: Recipe, *, rank: int, allow_change: Iterable[str] = ()) -> Path:
    """Create the run directory, or check that it belongs to this recipe; rank 0 begins `log.txt`.

    `write_recipe` follows when nothing else refuses the run.
    """
    directory = recipe.run_directory
    refuse_changes(directory, recipe, allow_change)
    if rank == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            start_logging(directory, verbose=True)
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot write the run directory: {error.strerror}") from None
    else:
        start_logging(None, verbose=False)
    return directory


def write_recipe(directory: Path, recipe: Recipe) -> None:
    """`config.yaml`: the recipe as it is resolved."""
    replace_file(directory / RECIPE_NAME, dump(recipe).encode())


def refuse_changes(directory: Path, recipe: Recipe, allow_change: Iterable[str]) -> None:
    """Raise with the differences if `directory` holds the run of a recipe that computes something else."""
    path = directory / RECIPE_NAME
    if not path.exists():
        own = {
            unfinished(path).name,
            LOG_NAME,
            LOCK_NAME,
            EVALUATION,
        }  # not of a run, or of a start that got no further
        if directory.exists() and any(item.name not in own for item in directory.iterdir()):
            raise CheckpointError(f"{directory}: not empty and no run of ours; give another `output`")
        return
    try:
        earlier = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):  # ValueError: no UTF-8, or a date that does not exist
        raise CheckpointError(f"{path}: cannot be read; give another `output`") from None
    if not isinstance(earlier, Mapping) or not {"name", "tasks", "phases"} <= earlier.keys():
        raise CheckpointError(f"{path}: not a recipe of ours; give another `output`")
    if _is_empty(directory):
        return
    changes = recipe_changes(earlier, recipe, allow_change)
    if changes:
        raise CheckpointError(
            f"{directory} holds the run of another recipe ({listed(changes)}): "
            "give another `output`, or name what may change with --allow-change KEY"
        )


def recipe_changes(earlier: Mapping[str, Any], recipe: Recipe, allow_change: Iterable[str]) -> list[str]:
    """What a resolved recipe says otherwise than `earlier` that changes what is computed and may not change."""
    with contextlib.suppress(ConfigError):  # of another version: keys that it did not know have their defaults
        earlier = to_mapping(from_mapping(Recipe, earlier, ""))
    allowed = (*FREE_KEYS, *allow_change)
    return [
        f"{key}: {old!r} -> {new!r}"
        for key, old, new in differences(earlier, to_mapping(recipe))
        if not any(key == free or key.startswith(f"{free}.") for free in allowed)
    ]


def listed(changes: Sequence[str]) -> str:
    """Changes on one line; what is not ours may differ in everything."""
    shown = [change if len(change) <= _SHOWN_LENGTH else f"{change[:_SHOWN_LENGTH]}..." for change in changes[:_SHOWN]]
    return "; ".join(shown) + (f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else "")


def _is_empty(directory: Path) -> bool:
    """Whether no optimizer step was taken here: a start that was refused must not bind the mended recipe."""
    metrics = directory / METRICS_NAME
    taken = metrics.exists() and metrics.stat().st_size > 0
    return not taken and not any((directory / FOLDER).glob("step-*"))


def differences(old: Any, new: Any, path: str = "") -> Iterable[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two plain structures differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from differences(left, right, f"{path}.{index}")
    elif old != new:
        yield path, old, new


class _LogFile(logging.FileHandler):
    """A log that cannot be written is said once; logging's own way is a traceback for every line."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not self.told:
            print(f"{self.baseFilename}: cannot be written ({sys.exc_info()[1]}): lines are missing", file=sys.stderr)
        self.told = True


def start_logging(directory: Path | None, *, verbose: bool) -> None:
    """Plain lines on stderr, and in `log.txt` of `directory` if there is one; warnings only unless `verbose`."""
    logger = logging.getLogger("villa_ds")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.addHandler(logging.StreamHandler(sys.stderr))
    if directory is not None:
        file = _LogFile(directory / LOG_NAME, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)


def read_results(directory: Path) -> dict[str, dict[str, float]] | None:
    """What `write_results` wrote, or None."""
    try:
        results: dict[str, dict[str, float]] = json.loads((directory / RESULTS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return results


def write_results(directory: Path, results: Mapping[str, Any]) -> None:
    """`results.json`: the final validation."""
    replace_file(directory / RESULTS_NAME, f"{json.dumps(results, indent=1)}\n".encode())
