"""`villa-ds predict`: what trained runs say about new pictures and texts, through the extractor of their regions."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from villa_ds.batch import Batch
from villa_ds.config import EngineConfig, Recipe
from villa_ds.data.convert.account import LOG_NAME, Tally
from villa_ds.data.convert.extractor import RegionExtractor
from villa_ds.data.convert.images import SUFFIXES, from_images
from villa_ds.data.convert.jsonl import JsonlTexts
from villa_ds.data.convert.settings import Settings
from villa_ds.data.convert.texts import TextsFile
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.loader import EvaluationLoader
from villa_ds.data.manifest import Manifest, Vocabulary, load_manifest
from villa_ds.data.store import LocalStore
from villa_ds.errors import CheckpointError, ConfigError, DataError
from villa_ds.mapping import from_mapping
from villa_ds.objectives.base import Objective, build_objective
from villa_ds.train.checkpoint import resolve_checkpoint
from villa_ds.train.ensemble import Ensemble, load_ensemble
from villa_ds.train.state import read_run_state, require_inputs

_PICTURES, _TEXTS, _SHARDS = "pictures", "texts.jsonl", "shards"  # in the folder of what is made on the way


class Predictor:
    """Runs of one recipe, with the extractor that found the regions they were trained on, ready to be asked.

    `runs` are run directories or checkpoints; the answers of several are averaged (`train.ensemble`). `objective`
    chooses among the run's tasks, `device` is as in a recipe.

    CheckpointError if a checkpoint does not tell what it was trained on, or that is not what `extractor` finds.
    ConfigError if there is no such task, or nothing to predict in it.
    """

    def __init__(
        self, runs: Sequence[Path], extractor: RegionExtractor, objective: str | None = None, device: str | None = None
    ) -> None:
        folders = [resolve_checkpoint(run) for run in runs]
        states = [read_run_state(folder) for folder in folders]
        for run, state in zip(runs, states, strict=True):
            require_inputs(run, state)
            if state["inputs"] != states[0]["inputs"]:
                raise CheckpointError(
                    f"{run}: trained on other vocabulary, answers or regions than {runs[0]}: ask it alone"
                )
        self._inputs: Mapping[str, Any] = states[0]["inputs"]
        self._recipe = _asked(from_mapping(Recipe, states[0]["recipe"], ""))
        task = _task(self._recipe, objective, runs[0])
        trained = self._inputs["sets"][task.data]
        if trained["extractor"] != extractor.fingerprint:
            raise CheckpointError(
                f"{runs[0]}: trained on regions of {trained['extractor']!r}, but this extractor is "
                f"{extractor.fingerprint!r}: give the one that made its sets, whose file lies beside them"
            )
        self._extractor, self._answers = extractor, tuple(trained["answers"])
        objectives = [
            build_objective(each.objective, self._recipe.objectives, self._described(each.data))
            for each in self._recipe.tasks
        ]
        engine = EngineConfig(device=device)
        reference = self._described(task.data)
        self._models: Ensemble = load_ensemble(self._recipe.model, objectives, reference, engine, folders)
        self._objective = self._models.objectives[task.objective].held_out()
        _require_predictions(self._objective)

    def _described(self, name: str) -> Manifest:
        """What a manifest of new images would say, for objectives and model; it has no shards."""
        classes = self._extractor.detector_classes
        return Manifest(
            store=LocalStore(Path(name)),
            shards=(),
            feature_width=self._extractor.feature_width,
            detector_classes=classes,
            label_format="dense" if classes else "none",
            vocabulary=Vocabulary.of(self._inputs["pieces"]),
            answers=tuple(self._inputs["sets"][name]["answers"]),
            extractor=self._extractor.fingerprint,
            source="",
            command="",
            fingerprint="",
            index_files={},
        )

    def ask(self, images: Path, texts: Path, top: int = 5, processes: int | None = None) -> Iterator[dict[str, Any]]:
        """One object for each text of a file of JSON lines about the pictures under `images`, in its order.

        `id`, `image`, `text` and what the objective predicts (docs/prediction.md), or `error`: why it does not. Texts
        and pictures become a shard set in a temporary folder, as training's did. DataError if there is none.
        """
        pieces = self._inputs["pieces"]
        settings = Settings(
            pieces, command="villa-ds predict", answers=self._answers, allow_rejected=True, processes=processes
        )
        with tempfile.TemporaryDirectory(prefix="villa-ds-") as scratch, closing(JsonlTexts(texts, pieces)) as rows:
            out = Path(scratch) / _SHARDS
            try:
                from_images(out, images, TextsFile(texts), self._extractor, settings)
            except DataError as refusal:  # the rest of its lines is about converting
                raise DataError(f"none of {texts.name} can be answered: {str(refusal).splitlines()[0]}") from None
            predictions = self._predictions(load_manifest(out), top)
            rejected = list(_rejections(out))
            why = dict(reversed(rejected))
            listed = list(rows.scan(Tally("text", lambda kind, error: None)))  # reading moves the file's position
            for each in listed:
                image = each.images[0] if len(each.images) == 1 else list(each.images)
                asked = {"id": each.id, "image": image, "text": rows.read(each.place).text}
                said = predictions.get(each.id)
                yield asked | ({"error": why[each.id]} if said is None else said)
            unanswered = {each.id for each in listed} - predictions.keys()
            for name, error in rejected:
                if name not in unanswered:  # a line that is not what it should be, or an id that occurs again
                    yield {"id": name, "error": error}

    @torch.no_grad()
    def _predictions(self, manifest: Manifest, top: int) -> dict[str, dict[str, object]]:
        found: dict[str, dict[str, object]] = {}
        data = dataclasses.replace(self._recipe.data, workers=0)
        loader = EvaluationLoader(manifest, self._objective, data, BatchPlan(lanes=1), 0)
        for batch, _ in loader:
            found.update(self._predict(batch.to(self._models.device), top))
        return found

    def _predict(self, batch: Batch, top: int) -> Iterable[tuple[str, dict[str, object]]]:
        output = self._models.probe(batch, self._objective.name)
        return zip(batch.ids, self._objective.forecast(output, batch, top), strict=True)


def _asked(recipe: Recipe) -> Recipe:
    """The recipe for pairs as they are given: no image is replaced."""
    itm = dataclasses.replace(recipe.objectives.itm, negative_probability=0.0)
    return dataclasses.replace(recipe, objectives=dataclasses.replace(recipe.objectives, itm=itm))


def _task(recipe: Recipe, objective: str | None, run: Path) -> Any:
    """The task of that objective, or the only one."""
    named = {task.objective: task for task in reversed(recipe.tasks)}
    if objective is None and len(named) > 1:
        raise ConfigError(f"{run} was trained for {', '.join(sorted(named))}: choose with --objective")
    chosen = next(iter(named)) if objective is None else objective
    if chosen not in named:
        raise ConfigError(f"--objective {chosen!r}: {run} was trained for {', '.join(sorted(named))}")
    return named[chosen]


def _require_predictions(objective: Objective) -> None:
    if type(objective).predictions is Objective.predictions:
        raise ConfigError(f"--objective {objective.name!r}: predicts nothing of a pair; it is for training only")
    if objective.negative_probability > 0 or objective.candidates > 0:
        raise ConfigError(
            f"--objective {objective.name!r}: ranks pairs among others of a set: convert the pictures with "
            "`villa-ds shards from-images`, and use `villa-ds evaluate`"
        )


def _rejections(out: Path) -> Iterator[tuple[str, str]]:
    """(id or line, why) of each rejected text."""
    path = out / LOG_NAME
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line)
        if row["kind"] == "text":
            yield row["name"], row["detail"]


def single_picture(folder: Path, picture: Path, texts: Sequence[str]) -> tuple[Path, Path]:
    """A folder with one picture in it, and a file with texts about it, made in `folder`."""
    if picture.suffix.lower() not in SUFFIXES or not picture.is_file():
        raise DataError(f"{picture}: no such picture; give one that ends in {', '.join(SUFFIXES)}")
    (folder / _PICTURES).mkdir()
    os.symlink(picture.resolve(), folder / _PICTURES / picture.name)
    rows = [{"id": str(place), "image": picture.name, "text": text} for place, text in enumerate(texts)]
    (folder / _TEXTS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / _PICTURES, folder / _TEXTS
