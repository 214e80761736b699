"""What the report tells of trained runs, measured: nothing here knows how it is shown."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from villa_ds.analysis.attention import RowAttention, rows_attention
from villa_ds.analysis.curves import Panel, panels_of
from villa_ds.analysis.intervals import Estimate, estimate
from villa_ds.analysis.maps import MapTable, PictureFolder, Shown, by_head, by_word
from villa_ds.analysis.probing import COREFERENCE, RELATION, Key, Probe, Weights, probe, probes_of
from villa_ds.analysis.rephrasing import Question, Robustness, question_of, robustness
from villa_ds.analysis.runs import TrainedRun
from villa_ds.analysis.table import Result, results_of
from villa_ds.batch import Sample
from villa_ds.data.convert.extractor import read_picture
from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.data.reader import ShardReader
from villa_ds.data.transport import join
from villa_ds.data.wordpiece import WordPieces
from villa_ds.errors import ConfigError, DataError
from villa_ds.objectives.answers import AnswerScoring
from villa_ds.train.module import TrainModule

if TYPE_CHECKING:
    from villa_ds.analysis.known import Album, KnownImage


@dataclass(frozen=True)
class Inside:
    """What of a shard set is looked into."""

    place: str | None = None  # a shard set; None: the first run's first held-out set
    texts: Sequence[str] = ()  # ids of texts whose attention is drawn; without any, probes are
    maps: int = 4  # texts whose attention is drawn, unless they are named
    images: int = 600  # at most, that are probed and asked about
    pictures: Path | None = None  # a folder with the images that the set's names call
    curves: Path | None = None  # where the training curves are drawn once more, as one PNG


@dataclass(frozen=True)
class Material:
    """What is read of a shard set."""

    manifest: Manifest
    samples: Mapping[str, tuple[str, str, Sample]]  # text id -> image, text, sample; those of `Inside.texts` only
    probes: Sequence[Probe]
    questions: Sequence[Question]
    unknown: int  # questions that could not be rephrased
    images: int  # that were read
    known: Mapping[str, "KnownImage"]


@dataclass(frozen=True)
class Drawn:
    """A text whose attention is drawn."""

    image: str
    text: str
    shown: Shown
    described: int  # position of the word whose heads are drawn one by one
    words: MapTable
    heads: MapTable


@dataclass(frozen=True)
class Found:
    """All that the report tells."""

    runs: Sequence[TrainedRun]
    parameters: Mapping[str, int]  # by run
    results: Sequence[Result]
    curves: Sequence[tuple[tuple[str, ...], Sequence[Panel]]]  # tasks of the runs, and their panels
    material: Material
    drawn: Sequence[Drawn]
    links: Mapping[str, Mapping[Key, Weights]]  # by run; empty where there is nothing to hold attention against
    robustness: Mapping[str, Robustness]  # by run that answers questions; empty without questions
    answering: bool  # whether there is such a run
    deviations: Mapping[str, float]  # by run: how far contexts recomputed from its attention are from its own, at most


def look(runs: Sequence[TrainedRun], inside: Inside, device: str | None) -> Found:
    """Look into runs. CheckpointError or DataError if one of them does not fit the shard set."""
    manifest = load_manifest(inside.place or _held_out_set(runs[0]))
    for run in runs:
        run.require_fit(manifest)
    material = _read(manifest, inside, WordPieces(runs[0].pieces))
    models = {run.label: run.model(manifest, device) for run in runs}
    attention = _Attention(models, manifest)
    drawn = _draw(attention, material, inside)
    samples = [each.sample for each in material.probes]
    links = {label: probe(material.probes, attention.of(label, samples)) for label in models} if samples else {}
    answering = {
        label: (model, objective.held_out())
        for label, model in models.items()
        for objective in model.objectives.values()
        if isinstance(objective, AnswerScoring) and objective.name == "vqa"
    }
    robust = {
        label: robustness(model, objective, material.questions)
        for label, (model, objective) in answering.items()
        if isinstance(objective, AnswerScoring) and material.questions
    }
    return Found(
        runs=runs,
        parameters={
            label: sum(parameter.numel() for parameter in model.parameters()) for label, model in models.items()
        },
        results=[row for run in runs for row in results_of(run.label, run.directory, required=False)],
        curves=[(tasks, panels_of({run.label: run.rows() for run in group})) for tasks, group in grouped(runs).items()],
        material=material,
        drawn=drawn,
        links=links,
        robustness=robust,
        answering=bool(answering),
        deviations=attention.deviations,
    )


def grouped(runs: Sequence[TrainedRun]) -> dict[tuple[str, ...], list[TrainedRun]]:
    """Runs of the same objectives."""
    groups: dict[tuple[str, ...], list[TrainedRun]] = {}
    for run in runs:
        groups.setdefault(run.tasks, []).append(run)
    return groups


def compared_links(weights: Weights, base: Weights) -> Estimate:
    """The same links under two runs, each by its own head of the largest weight: the difference."""
    score, other = weights.largest(), base.largest()
    return estimate(score.weights - other.weights, score.images)


@dataclass
class _Attention:
    """Attention of the runs, and how far it is from what the models compute."""

    models: Mapping[str, TrainModule]
    manifest: Manifest
    deviations: dict[str, float] = field(default_factory=dict)

    def of(self, label: str, samples: Sequence[Sample]) -> Iterator[RowAttention]:
        """A run's attention over samples, one after the other."""
        for attention, deviation in rows_attention(self.models[label].backbone, samples, self.manifest.vocabulary):
            self.deviations[label] = max(self.deviations.get(label, 0.0), deviation)
            yield attention


def _held_out_set(run: TrainedRun) -> str:
    places = list(run.recipe.data.validation.values())
    if not places:
        raise ConfigError(f"{run.directory}: its recipe names no held-out set: give one with --set FOLDER")
    return join(run.recipe.data.root, places[0])


class _Demo:
    """The album of the demo's images, opened at the first of them: other sets do without its package."""

    _album: "Album | None" = None

    def known(self, name: str) -> "KnownImage | None":
        """What an image shows; None if that is not known."""
        if not name.startswith("easy_vqa/"):
            return None
        if self._album is None:
            from villa_ds.analysis.known import Album  # noqa: PLC0415  # needs the package

            self._album = Album()
        return self._album.known(name)


def _read(manifest: Manifest, inside: Inside, word_pieces: WordPieces) -> Material:
    reader, album = ShardReader(manifest), _Demo()
    named: dict[str, tuple[str, str, Sample]] = {}
    known: dict[str, KnownImage] = {}
    probes: list[Probe] = []
    questions: list[Question] = []
    unknown = 0
    wanted = set(inside.texts) or {name.decode() for name in manifest.index["pair_id"][: inside.maps].tolist()}
    groups = manifest.index["pair_group"]
    ids = manifest.index["pair_id"].astype(str)
    for pair, identifier in enumerate(ids.tolist()):
        group = int(groups[pair])
        if group >= inside.images and identifier not in wanted:
            continue
        sample = reader.sample(pair)
        image, words = sample.regions.images[0].name, word_pieces.decode(sample.word_pieces.tolist())
        first = pair == 0 or groups[pair - 1] != group
        alone = len(sample.regions.images) == 1
        found = album.known(image) if first and alone else known.get(image)
        if found is not None:
            known[image] = found
        if identifier in wanted:
            named[identifier] = image, words, sample
        if group >= inside.images:
            continue
        if first and found is not None:
            probes += probes_of(found, sample, word_pieces)
        if manifest.answers:
            question = question_of(words, image, sample, word_pieces)
            unknown += question is None
            questions += [] if question is None else [question]
    missing = [name for name in inside.texts if name not in named]
    if missing:
        raise DataError(f"--text {missing[0]!r}: {manifest.store} has no text of this id")
    return Material(manifest, named, probes, questions, unknown, min(inside.images, manifest.num_groups), known)


def _draw(attention: _Attention, material: Material, inside: Inside) -> list[Drawn]:
    chosen = [] if inside.texts else _chosen_probes(material.probes, inside.maps)
    folder = None if inside.pictures is None else PictureFolder(inside.pictures)
    entries: list[tuple[str, str, Sample, Probe | None]] = [
        (each.image, each.text, each.sample, each) for each in chosen
    ] or [(*material.samples[name], None) for name in (inside.texts or list(material.samples))]
    attentions = {label: list(attention.of(label, [entry[2] for entry in entries])) for label in attention.models}
    pieces = WordPieces(material.manifest.read_pieces())
    drawn = []
    for number, (image, words, sample, found) in enumerate(entries):
        truth = {} if found is None else found.described
        shown = Shown(
            f"picture{number}",
            ["[CLS]", *(pieces.pieces[piece] for piece in sample.word_pieces.tolist()), "[SEP]"],
            sample.regions.boxes,
            _pixels(image, material, folder),
            truth,
        )
        of_row = {label: rows[number] for label, rows in attentions.items()}
        described = next(iter(truth), 1)
        drawn.append(Drawn(image, words, shown, described, by_word(shown, of_row), by_head(shown, of_row, described)))
    return drawn


def _chosen_probes(probes: Sequence[Probe], count: int) -> list[Probe]:
    """Of the images with the most to tell apart, in turn a caption and a relation."""
    fullest = sorted(probes, key=lambda each: -max((len(link.others) for link in each.links), default=0))
    kinds = {
        task: [each for each in fullest if any(link.task == task for link in each.links)]
        for task in (COREFERENCE, RELATION)
    }
    chosen: list[Probe] = []
    used: set[str] = set()
    while len(chosen) < count:
        task = (COREFERENCE, RELATION)[len(chosen) % 2]
        left = [each for each in kinds[task] or fullest if each.image not in used]
        if not left:
            break
        chosen.append(left[0])
        used.add(left[0].image)
    return chosen


def _pixels(image: str, material: Material, folder: PictureFolder | None) -> Any:
    if folder is not None and (path := folder.path_of(image)) is not None:
        return read_picture(image, path)
    return material.known[image].pixels if image in material.known else None
