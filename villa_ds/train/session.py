"""What a run is made of: its data, its model, its loaders, and what a checkpoint says of it besides tensors."""

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from villa_ds import __version__
from villa_ds.config import Recipe
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.loader import EvaluationLoader, Loader
from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.data.processes import fork_server
from villa_ds.data.sizes import SPECIAL_TOKENS, sizes_of
from villa_ds.data.transport import join
from villa_ds.errors import CheckpointError, ConfigError, DataError
from villa_ds.mapping import to_mapping
from villa_ds.models.weights import initialize_from, load_reference, to_reference
from villa_ds.objectives.base import Objective, build_objective
from villa_ds.objectives.retrieval import ImageTextRetrieval
from villa_ds.rng import seed_of
from villa_ds.train.checkpoint import is_checkpoint, resolve_checkpoint
from villa_ds.train.gallery import Gallery
from villa_ds.train.module import TrainModule, build_module
from villa_ds.train.parameters import ParameterFiles
from villa_ds.train.rundir import differences, listed, recipe_changes
from villa_ds.train.state import read_run_state
from villa_ds.train.torch_engine import DTYPES, Engine

TYPICAL_TOKENS = 16  # of a caption


@dataclass(frozen=True)
class RunData:
    """The data of a run: manifests by set name, and one objective per task in the recipe's order."""

    sets: Mapping[str, Manifest]
    validation: Mapping[str, Manifest]
    objectives: Sequence[Objective]
    pieces: Sequence[str]  # the vocabulary in the order of its ids

    def inputs(self) -> dict[str, Any]:
        """What new images and texts must be made like to be understood by the model: JSON, kept in checkpoints."""
        sets = {name: {"extractor": each.extractor, "answers": each.answers} for name, each in self.sets.items()}
        return {"pieces": self.pieces, "sets": sets}

    @property
    def reference(self) -> Manifest:
        """The manifest that gives widths and vocabulary; all sets agree on them."""
        return next(iter(self.sets.values()))


def open_data(recipe: Recipe) -> RunData:
    """Load the manifests and build the objectives; sets that do not fit together are a `DataError`."""
    settings = recipe.data
    if settings.workers:
        fork_server()  # it imports torch meanwhile
    sets = {name: load_manifest(join(settings.root, place), settings) for name, place in settings.sets.items()}
    validation = {
        name: load_manifest(join(settings.root, place), settings) for name, place in settings.validation.items()
    }
    everything = [*sets.values(), *validation.values()]
    for aspect in ("feature_width", "detector_classes"):
        _require_equal(aspect, everything, [getattr(manifest, aspect) for manifest in everything])
    if not recipe.data.mix_extractors:
        mend = "features are comparable only within one extractor; data.mix_extractors=true takes them all the same"
        _require_equal("extractor", everything, [manifest.extractor for manifest in everything], mend)
    _require_equal("vocabulary", everything, [manifest.vocabulary.sha256 for manifest in everything])
    for name in {task.objective for task in recipe.tasks}:  # objectives of one name share a head, so its classes
        sharing = [sets[task.data] for task in recipe.tasks if task.objective == name]
        _require_equal("answer list", sharing, [manifest.answers for manifest in sharing])
    objectives = [build_objective(task.objective, recipe.objectives, sets[task.data]) for task in recipe.tasks]
    return RunData(sets, validation, objectives, everything[0].read_pieces())


def _require_equal(
    aspect: str,
    manifests: Sequence[Manifest],
    values: Sequence[object],
    mend: str = "the sets of one run must come from one extractor and one vocabulary",
) -> None:
    for manifest, value in zip(manifests, values, strict=True):
        if value != values[0]:
            raise DataError(
                f"{manifest.store}: {aspect} {value!r} differs from {values[0]!r} of {manifests[0].store}: {mend}"
            )


def refuse_unequal_ranks(data: RunData, engine: Engine) -> None:
    """DataError on every rank if two of them opened different sets: a remote one was exchanged as they started."""
    opened = {**data.sets, **{f"validation {name}": manifest for name, manifest in data.validation.items()}}
    found = engine.gather({name: manifest.fingerprint for name, manifest in opened.items()})
    for rank, fingerprints in enumerate(found):
        for name, fingerprint in fingerprints.items():
            if fingerprint != found[0][name]:
                raise DataError(
                    f"{opened[name].store}: rank {rank} opened another set {name} than rank 0 (fingerprint "
                    f"{fingerprint}, {found[0][name]}): give all ranks the same data, start again"
                )


def build_initial_module(recipe: Recipe, data: RunData) -> TrainModule:
    """The model as it is before step 1: seeded initialisation, then the weights that the recipe names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(recipe.seed, "initialise"))
        module = build_module(recipe.model, data.objectives, data.reference)
    _refuse_long_texts(recipe, data, module.backbone.sizes.max_position_embeddings)
    if recipe.initialize is not None:
        load_initial_weights(module, Path(recipe.initialize), data, mix_extractors=recipe.data.mix_extractors)
    return module


def _refuse_long_texts(recipe: Recipe, data: RunData, positions: int) -> None:
    """Raise now for a text without a position: the step that meets it, or the last validation, may be days away."""
    for task, objective in zip(recipe.tasks, data.objectives, strict=True):
        training = (data.sets[task.data], recipe.data.max_text_length)
        held_out = [(data.validation[task.data], None)] if task.data in data.validation else []
        for manifest, limit in (training, *held_out):  # held out, no text is left out
            lengths = objective.own_text(sizes_of(manifest.index, slice(None)))
            longest = int((lengths if limit is None else lengths[lengths <= limit]).max(initial=0)) + SPECIAL_TOKENS
            if longest > positions:
                raise ConfigError(
                    f"model.max_position_embeddings: {positions} is too small for a text of {longest} tokens in "
                    f"{manifest.store}; raise it" + (", or lower data.max_text_length" if limit is not None else "")
                )


def load_initial_weights(module: TrainModule, path: Path, data: RunData, *, mix_extractors: bool = False) -> None:
    """Load the weights of a run, a checkpoint, a weights file or a BERT folder; what the model lacks is left out.

    A run on regions of another extractor than `data`'s is refused, unless `mix_extractors`.
    """
    if not path.exists():
        raise ConfigError(
            f"initialize: {path} does not exist: give a run, a checkpoint, a weights file or a BERT folder"
        )
    adaptations = [objective.adaptation for objective in data.objectives]
    if is_checkpoint(path):
        folder = resolve_checkpoint(path)
        if not mix_extractors:
            _refuse_other_regions(path, read_run_state(folder), data)
        load_reference(module, to_reference(ParameterFiles(folder).state_dict()), adaptations)
    else:
        initialize_from(module, path, data.reference.vocabulary, adaptations)


def _refuse_other_regions(path: Path, state: Mapping[str, Any], data: RunData) -> None:
    """Raise unless a checkpoint's run was on regions of the same extractor; one of before checkpoints told is taken."""
    trained = {each["extractor"] for each in state.get("inputs", {"sets": {}})["sets"].values()}
    own = {manifest.extractor for manifest in data.sets.values()}
    if trained and not own <= trained:
        raise ConfigError(
            f"initialize: {path} was trained on regions of {', '.join(sorted(trained))}, the sets here are of "
            f"{', '.join(sorted(own))}: features are comparable only within one extractor; "
            "data.mix_extractors=true takes them all the same"
        )


def rounding_warnings(recipe: Recipe, module: TrainModule) -> list[str]:
    """A line for each phase whose text perturbation a 16-bit encoder would mostly round away (docs/adversary.md).

    An ascent step changes one entry by about step_size / sqrt(tokens x width); what the encoder sees is that over the
    spread of the word embeddings, rounded to the format's resolution.
    """
    if recipe.engine.precision == "float32":
        return []
    resolution = torch.finfo(DTYPES[recipe.engine.precision]).eps
    spread = float(module.backbone.word_embedding.detach().float().std())
    lines = []
    for phase in recipe.phases:
        if phase.adversary is not None and phase.adversary.perturbs("text"):
            entry = phase.adversary.text.step_size / math.sqrt(TYPICAL_TOKENS * module.backbone.hidden_size) / spread
            if entry < resolution:
                lines.append(
                    f"phase {phase.name}: a text step of {phase.adversary.text.step_size} moves an entry by "
                    f"{entry:.0e} of the embeddings' spread, below the resolution {resolution:.0e} of "
                    f"{recipe.engine.precision}: most of it is rounded away; use float32, or a larger step_size"
                )
    return lines


def training_loader(
    recipe: Recipe, data: RunData, plan: BatchPlan, rank: int, position: Mapping[str, Any] | None, device: torch.device
) -> Loader:
    """This rank's stream of optimizer steps, from `position` (of a checkpoint) or the beginning to the run's end.

    For a GPU as `device` batches are put into page-locked memory.
    """
    tasks = [(task.data, objective, task.weight) for task, objective in zip(recipe.tasks, data.objectives, strict=True)]
    return Loader(
        data.sets,
        tasks,
        recipe.data,
        recipe.seed,
        plan,
        rank,
        recipe.total_steps,
        position,
        pin_memory=device.type == "cuda",
    )


def validation_loaders(
    recipe: Recipe, data: RunData, plan: BatchPlan, rank: int, limit: int, device: torch.device
) -> dict[str, tuple[Objective, EvaluationLoader]]:
    """One loader for each task whose data set has held-out data; `limit` micro-batches each, 0 for all."""
    loaders = {}
    for task, objective in zip(recipe.tasks, data.objectives, strict=True):
        if task.data in data.validation:
            manifest = data.validation[task.data]
            evaluated = objective.held_out()
            loaders[f"{task.data}/{task.objective}"] = (
                evaluated,
                EvaluationLoader(
                    manifest, evaluated, recipe.data, plan, rank, limit or None, pin_memory=device.type == "cuda"
                ),
            )
    return loaders


def validation_galleries(recipe: Recipe, data: RunData) -> dict[str, tuple[ImageTextRetrieval, Gallery]]:
    """What is ranked at a validation, by the names of `validation_loaders`; nothing unless `validation.gallery`.

    ConfigError where there is nothing to rank, or a pair exceeds `data.tokens`.
    """
    images, galleries = recipe.validation.gallery, {}
    if not images:
        return {}
    for task, objective in zip(recipe.tasks, data.objectives, strict=True):
        if task.data in data.validation and isinstance(objective, ImageTextRetrieval):
            gallery = Gallery(data.validation[task.data], images)
            gallery.require_budget(recipe.data.tokens)
            galleries[f"{task.data}/{task.objective}"] = (objective, gallery)
    if not galleries:
        raise ConfigError(
            f"validation.gallery: {images} images, but no task of the recipe ranks images (retrieval, retrieval-hard) "
            "of a set under data.validation; set it to 0"
        )
    return galleries


def run_state(recipe: Recipe, data: RunData, plan: BatchPlan, step: int, position: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the run besides tensors: JSON."""
    versions = {"villa_ds": __version__, "python": platform.python_version()}
    versions |= {"torch": torch.__version__, "numpy": np.__version__}
    return {
        "step": step,
        "position": dict(position),
        "batch_plan": plan.to_dict(),
        "recipe": to_mapping(recipe),
        "data": {name: manifest.fingerprint for name, manifest in data.sets.items()},
        "inputs": data.inputs(),
        "versions": versions,
    }


def refuse_silent_changes(
    folder: Path,
    state: Mapping[str, Any],
    recipe: Recipe,
    data: RunData,
    plan: BatchPlan,
    allow_change: Iterable[str],
) -> None:
    """Raise if going on from the checkpoint `folder` would change the run: other recipe, data or batch arithmetic.

    The run directory's recipe is checked before; the checkpoint may have been copied from another run.
    """
    allow_change = tuple(allow_change)
    allowed = {"batch_plan.world", *allow_change}
    if {"data", "data.lanes"} & allowed:  # the same thing by the name that the user knows
        allowed.add("batch_plan.lanes")
    current = {"data": {name: manifest.fingerprint for name, manifest in data.sets.items()}}
    current["batch_plan"] = plan.to_dict()  # type: ignore[assignment]
    changes = [
        f"{part}.{key}: {old!r} -> {new!r}"
        for part, values in current.items()
        for key, old, new in differences(state[part], values)
        if not {part, f"{part}.{key}"} & allowed
    ]
    changes += recipe_changes(state["recipe"], recipe, allow_change)
    if changes:
        raise CheckpointError(
            f"{folder}: going on would silently change the run ({listed(changes)}): "
            "restore what was, or name what may change with --allow-change KEY"
        )
