"""Trained runs side by side: their models on one shard set, their results, their steps."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from villa_ds.config import EngineConfig, Recipe
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.errors import CheckpointError, ConfigError
from villa_ds.mapping import from_mapping
from villa_ds.objectives.base import build_objective
from villa_ds.train.checkpoint import resolve_checkpoint
from villa_ds.train.metrics import METRICS_NAME
from villa_ds.train.module import TrainModule, build_module
from villa_ds.train.parameters import load_weights
from villa_ds.train.state import read_run_state, require_inputs
from villa_ds.train.torch_engine import device_of


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint, and the run that it is of."""

    label: str
    checkpoint: Path
    state: Mapping[str, Any]  # what the checkpoint says besides tensors
    recipe: Recipe

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.checkpoint.parent.parent

    @property
    def step(self) -> int:
        """Optimizer steps of the checkpoint."""
        return int(self.state["step"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Objectives, sorted: runs of equal ones have comparable curves."""
        return tuple(sorted({task.objective for task in self.recipe.tasks}))

    @property
    def pieces(self) -> tuple[str, ...]:
        """The vocabulary in the order of its ids."""
        return tuple(self.state["inputs"]["pieces"])

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl up to the checkpoint; empty without the file. A torn last line is left out."""
        path, found = self.directory / METRICS_NAME, []
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["step"] <= self.step:
                found.append(row)
        return found

    def model(self, manifest: Manifest, device: str | None) -> TrainModule:
        """The trained model in float32 and evaluation mode, its objectives as for a set like `manifest`."""
        sets = self.state["inputs"]["sets"]
        objectives = [
            build_objective(
                task.objective,
                self.recipe.objectives,
                dataclasses.replace(manifest, answers=tuple(sets[task.data]["answers"])),
            )
            for task in self.recipe.tasks
        ]
        module = build_module(self.recipe.model, objectives, manifest)
        load_weights(module, self.checkpoint)
        return module.requires_grad_(False).to(device_of(EngineConfig(device=device))).eval()

    def require_fit(self, manifest: Manifest) -> None:
        """CheckpointError unless the run was trained on word pieces and regions like the set's."""
        if Vocabulary.of(self.pieces).sha256 != manifest.vocabulary.sha256:
            raise CheckpointError(
                f"{self.checkpoint}: trained with another vocabulary than that of {manifest.store}: give the report a "
                "--set with the run's own, and runs with different ones reports of their own"
            )
        extractors = {each["extractor"] for each in self.state["inputs"]["sets"].values()}
        if manifest.extractor not in extractors:
            raise CheckpointError(
                f"{self.checkpoint}: trained on regions of {', '.join(sorted(extractors))}, but those of "
                f"{manifest.store} are of {manifest.extractor}: give a --set of the same extractor"
            )


def open_run(named: str) -> TrainedRun:
    """The run or checkpoint that a user names as PATH or LABEL=PATH; without a label, the run directory's name.

    CheckpointError if there is none, or it does not tell what it was trained on.
    """
    label, separator, place = named.partition("=")
    if not separator or Path(named).exists():
        label, place = "", named
    elif not label or not place:
        raise ConfigError(f"RUN {named!r}: give PATH or LABEL=PATH")
    folder = resolve_checkpoint(Path(place))
    state = read_run_state(folder)
    require_inputs(folder, state)
    return TrainedRun(label or folder.parent.parent.name, folder, state, from_mapping(Recipe, state["recipe"], ""))


def open_runs(named: Sequence[str]) -> list[TrainedRun]:
    """All of them. ConfigError if two have one label."""
    runs = [open_run(each) for each in named]
    for place, run in enumerate(runs):
        if any(run.label == other.label for other in runs[:place]):
            raise ConfigError(f"RUN {named[place]!r}: two runs are called {run.label!r}: give LABEL=PATH")
    return runs
