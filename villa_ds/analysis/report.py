"""`villa-ds report`: trained runs side by side in one HTML file that needs nothing else.

What was compared, held-out results, training curves, attention maps, probing of the heads, rephrased questions.
"""

import json
import math
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from villa_ds import __version__
from villa_ds.analysis.attention import RowAttention, rows_attention
from villa_ds.analysis.curves import SPAN, draw, draw_one, panels_of
from villa_ds.analysis.intervals import Estimate, estimate
from villa_ds.analysis.maps import PictureFolder, Shown, by_head, by_word, definition
from villa_ds.analysis.page import Markup, Section, details, figures, note, page, paragraph, table, text
from villa_ds.analysis.probing import BACKWARD, COREFERENCE, FORWARD, RELATION, Key, Probe, Weights, probe, probes_of
from villa_ds.analysis.rephrasing import FORMS, Question, question_of, robustness
from villa_ds.analysis.runs import TrainedRun, open_runs
from villa_ds.analysis.table import HEADER, results_of
from villa_ds.batch import Sample
from villa_ds.data.convert.extractor import read_picture
from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.data.reader import ShardReader
from villa_ds.data.transport import join
from villa_ds.data.wordpiece import WordPieces
from villa_ds.errors import ConfigError, DataError
from villa_ds.mapping import to_mapping
from villa_ds.objectives.answers import AnswerScoring
from villa_ds.train.module import TrainModule
from villa_ds.train.rundir import FREE_KEYS, differences

if TYPE_CHECKING:
    from villa_ds.analysis.known import Album, KnownImage

_ENDS = {
    (COREFERENCE, FORWARD): "word to region",
    (COREFERENCE, BACKWARD): "region to word",
    (RELATION, FORWARD): "subject to object",
    (RELATION, BACKWARD): "object to subject",
}


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
class _Material:
    """What is read of a shard set."""

    manifest: Manifest
    samples: Mapping[str, tuple[str, str, Sample]]  # text id -> image, text, sample; those of `Inside.texts` only
    probes: Sequence[Probe]
    questions: Sequence[Question]
    unknown: int  # questions that could not be rephrased
    images: int  # that were read
    known: Mapping[str, "KnownImage"]


def report(named: Sequence[str], out: Path, inside: Inside, command: str, device: str | None = None) -> Path:
    """Write the report of runs, each PATH or LABEL=PATH, to `out`.

    ConfigError, CheckpointError or DataError if a run cannot be read, or does not fit the shard set.
    """
    runs = open_runs(named)
    manifest = load_manifest(inside.place or _held_out_set(runs[0]))
    for run in runs:
        run.require_fit(manifest)
    material = _read(manifest, inside, WordPieces(runs[0].pieces))
    models = {run.label: run.model(manifest, device) for run in runs}
    notes = _Notes()
    sections = [
        Section("compared", "What was compared", _compared(runs, models)),
        Section("results", "Held-out results", _held_out(runs)),
        Section("curves", "Training curves", _curves(runs)),
        Section("attention", "Attention maps", _attention(models, material, inside, notes)),
        Section("probing", "Probing of the heads", _probing(runs, models, material, notes)),
        Section("rephrasing", "Rephrased questions", _rephrasing(models, material)),
    ]
    sections.append(Section("made", "How this was made", _made(runs, material, command, notes)))
    lead = paragraph(
        f"{' beside '.join(run.label for run in runs)}: how they were trained, what they score, what their attention "
        "looks at, and how they take questions put in other words."
    )
    if inside.curves is not None:
        draw({run.label: run.rows() for run in runs}, inside.curves)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page("Looking inside trained runs", lead, sections), encoding="utf-8")
    return out


@dataclass
class _Notes:
    """What is told of how it was made."""

    deviations: dict[str, float] = field(default_factory=dict)  # of recomputed contexts, by run

    def attend(
        self, label: str, model: TrainModule, samples: Sequence[Sample], manifest: Manifest
    ) -> Iterator[RowAttention]:
        """Attention of a run over samples, one after the other; keeps how far the contexts deviate."""
        for attention, deviation in rows_attention(model.backbone, samples, manifest.vocabulary):
            self.deviations[label] = max(self.deviations.get(label, 0.0), deviation)
            yield attention


# What is read ---------------------------------------------------------------------------------------------------------


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


def _read(manifest: Manifest, inside: Inside, word_pieces: WordPieces) -> _Material:
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
    return _Material(manifest, named, probes, questions, unknown, min(inside.images, manifest.num_groups), known)


# Sections -------------------------------------------------------------------------------------------------------------


def _compared(runs: Sequence[TrainedRun], models: Mapping[str, TrainModule]) -> str:
    rows = []
    for run in runs:
        phases = "; ".join(
            f"{phase.steps} {'standard' if phase.adversary is None else 'adversarial'}" for phase in run.recipe.phases
        )
        millions = sum(parameter.numel() for parameter in models[run.label].parameters()) / 1e6
        rows.append((run.label, run.recipe.name, ", ".join(run.tasks), phases, f"{run.step:,}", f"{millions:.2f}"))
    body = table(("run", "recipe", "tasks", "optimizer steps", "checkpoint", "million parameters"), rows, "", 4)
    for tasks, group in _grouped(runs).items():
        changed = _differing(group)
        if changed:
            body += f"<h3>Where the recipes for {text(', '.join(tasks))} differ</h3>"
            body += table(("key", *(run.label for run in group)), changed, numbers_from=len(group) + 1)
        elif len(group) > 1:
            body += note(f"The recipes for {', '.join(tasks)} are the same, but for where they lie.")
    return body


def _grouped(runs: Sequence[TrainedRun]) -> dict[tuple[str, ...], list[TrainedRun]]:
    """Runs of the same objectives."""
    groups: dict[tuple[str, ...], list[TrainedRun]] = {}
    for run in runs:
        groups.setdefault(run.tasks, []).append(run)
    return groups


def _differing(runs: Sequence[TrainedRun]) -> list[tuple[object, ...]]:
    """(dotted key, each run's value) of what the recipes set differently, but for where and how a run ran."""
    recipes = [to_mapping(run.recipe) for run in runs]
    keys = dict.fromkeys(key for other in recipes[1:] for key, _, _ in differences(recipes[0], other))
    free = [key for key in FREE_KEYS if key != "engine"]
    return [
        (key, *(_value(_at(recipe, key)) for recipe in recipes))
        for key in keys
        if not any(key == each or key.startswith(f"{each}.") for each in free)
    ]


def _at(recipe: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(recipe, list):
            recipe = recipe[int(part)] if int(part) < len(recipe) else None
        elif isinstance(recipe, Mapping):
            recipe = recipe.get(part)
    return recipe


def _value(value: Any) -> object:
    if isinstance(value, Mapping | list):
        return Markup(details("settings", f"<pre>{text(json.dumps(value, indent=1))}</pre>"))
    return "none" if value is None else value


def _held_out(runs: Sequence[TrainedRun]) -> str:
    rows: list[tuple[str, ...]] = []
    missing = []
    for run in runs:
        try:
            rows += results_of(run.label, run.directory)
        except ConfigError:
            missing.append(run.label)
    body = table(HEADER, rows, numbers_from=2) if rows else ""
    body += note(
        "The newest villa-ds evaluate of each run counts; without one, the validation at its end.",
        "The majority baseline always gives the commonest answer.",
    )
    return body + (note(f"Not evaluated: {', '.join(missing)}.") if missing else "")


def _curves(runs: Sequence[TrainedRun]) -> str:
    body = note(
        f"Faint: every optimizer step; line: mean, weighted over 1/{SPAN} of the run to either side.",
        "Dashed: where a phase begins.",
    )
    order = [run.label for run in runs]
    groups = _grouped(runs)
    with tempfile.TemporaryDirectory(prefix="villa-ds-") as scratch:
        for tasks, group in groups.items():
            rows = {run.label: run.rows() for run in group}
            drawn = []
            for panel in panels_of(rows):
                path = draw_one(panel, order, Path(scratch) / "panel.png")
                drawn.append(
                    (
                        path.read_bytes(),
                        f"{panel.name} of {', '.join(each.run for each in panel.series)}",
                    )
                )
            if len(groups) > 1:
                body += f"<h3>{text(', '.join(tasks))}</h3>"
            body += figures(drawn) if drawn else note("No metrics.jsonl beside the checkpoint: no curves.")
    return body


def _attention(models: Mapping[str, TrainModule], material: _Material, inside: Inside, notes: _Notes) -> str:
    chosen = [] if inside.texts else _chosen_probes(material.probes, inside.maps)
    folder = None if inside.pictures is None else PictureFolder(inside.pictures)
    body = note(
        "Each map shows how much of its attention a word piece gives to each region: the brighter, the more.",
        "Rows are layers of each run, averaged over heads; folded below, the heads of one word (layer.head).",
        "Green frame: the region of the thing that the word is about, where that is known.",
    )
    entries: list[tuple[str, str, Sample, Probe | None]] = [
        (each.image, each.text, each.sample, each) for each in chosen
    ] or [(*material.samples[name], None) for name in (inside.texts or list(material.samples))]
    attentions = {
        label: list(notes.attend(label, model, [entry[2] for entry in entries], material.manifest))
        for label, model in models.items()
    }
    pieces = WordPieces(material.manifest.read_pieces())
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
        body += f"<h3>“{text(words)}”</h3>" + definition(shown) + note(image) + by_word(shown, of_row)
        body += details(f"All heads, for “{shown.pieces[described]}”", by_head(shown, of_row, described))
    return body


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


def _pixels(image: str, material: _Material, folder: PictureFolder | None) -> Any:
    if folder is not None and (path := folder.path_of(image)) is not None:
        return read_picture(image, path)
    return material.known[image].pixels if image in material.known else None


def _probing(runs: Sequence[TrainedRun], models: Mapping[str, TrainModule], material: _Material, notes: _Notes) -> str:
    if not material.probes:
        return note("What the images of this set show is not known, so there is nothing to hold attention against.")
    samples = [each.sample for each in material.probes]
    weights = {
        label: probe(material.probes, notes.attend(label, model, samples, material.manifest))
        for label, model in models.items()
    }
    body = paragraph(
        f"{len(material.probes):,} texts made for {len({each.image for each in material.probes}):,} images whose truth "
        "is known. Coreference: the largest attention between a word and the region of the thing that it is about.",
        "Relation: the attention between the regions of two things of which the text says how they stand.",
        "Heads are chosen on every other image and scored on the rest; intervals are 95% over images.",
    )
    keys = list(next(iter(weights.values())))
    if not keys:
        return body + note("There are too few of these images.")
    body += _largest_table(keys, weights)
    pairs = [(run.label, group[0].label) for group in _grouped(runs).values() for run in group[1:]]
    if pairs:
        body += _difference_table(keys, weights, pairs)
    for task in (COREFERENCE, RELATION):
        own = [key for key in keys if key[0] == task]
        if own:
            body += f"<h3>{task.capitalize()}: the most telling head</h3>" + _telling_table(own, weights)
    body += note(
        "The most telling head is the one whose weight is most above what it gives to the region of another thing of "
        "the same image instead. Right first: how often the right region gets more than every other thing's.",
    )
    for label, found in weights.items():
        body += details(f"All heads of {label}", _heat(found))
    return body


def _largest_table(keys: Sequence[Key], weights: Mapping[str, Mapping[Key, Weights]]) -> str:
    rows = []
    for key in keys:
        scores = [found[key].largest() for found in weights.values()]
        cells = [f"{_interval(score.right)} ({_head(score.head)})" for score in scores]
        rows.append((key[0], key[1], _ENDS[key[0], key[2]], *cells, f"{scores[0].uniform:.3f}"))
    header = ("", "link", "direction", *weights, "uniform")
    caption = "Largest mean weight of any head (layer.head), as in the paper's Table 4; and of uniform attention"
    return table(header, _without_repeats(rows, 2), caption, numbers_from=3)


def _difference_table(
    keys: Sequence[Key], weights: Mapping[str, Mapping[Key, Weights]], pairs: Sequence[tuple[str, str]]
) -> str:
    """The same links under two runs; each of its own head of the largest weight."""
    rows = []
    for key in keys:
        cells = []
        for label, base in pairs:
            score, other = weights[label][key].largest(), weights[base][key].largest()
            cells.append(_interval(estimate(score.weights - other.weights, score.images), signed=True))
        rows.append((key[0], key[1], _ENDS[key[0], key[2]], *cells))
    header = ("", "link", "direction", *(f"{label} − {base}" for label, base in pairs))
    return table(header, _without_repeats(rows, 2), "Differences of these, link by link", numbers_from=3)


def _telling_table(keys: Sequence[Key], weights: Mapping[str, Mapping[Key, Weights]]) -> str:
    header = ("link", "direction", "run", "head", "weight", "other region", "above", "right first", "chance", "links")
    rows = []
    for key in keys:
        for label, found in weights.items():
            score = found[key].most_telling()
            values = (*map(_interval, (score.right, score.other)), _interval(score.above, signed=True))
            shares = (_interval(score.hits), f"{score.chance:.3f}", f"{score.right.count:,}")
            rows.append((key[1], _ENDS[key[0], key[2]], label, _head(score.head), *values, *shares))
    return table(header, _without_repeats(rows, 2), numbers_from=3)


def _without_repeats(rows: Sequence[tuple[str, ...]], columns: int) -> list[tuple[str, ...]]:
    """Rows whose first columns are blank where they say what the row above says."""
    found: list[tuple[str, ...]] = []
    for row, above in zip(rows, [None, *rows], strict=False):
        same = 0
        while above is not None and same < columns and row[same] == above[same]:
            same += 1
        found.append(("",) * same + row[same:])
    return found


def _heat(found: Mapping[Key, Weights]) -> str:
    """Weight above another thing's region, of every head."""
    body = note(
        "Mean weight on the right region minus that on another thing's, over all links. Orange: above 0; blue: below."
    )
    first = next(iter(found.values()))
    _, layers, heads = first.right.shape
    means = {key: (each.right - each.other).mean(0) for key, each in found.items()}
    strongest = max(float(np.abs(each).max()) for each in means.values()) or 1.0
    columns = [(layer, head) for layer in range(layers) for head in range(heads)]
    rows = []
    for key, mean in means.items():
        cells = []
        for layer, head in columns:
            value = _rounded(float(mean[layer, head]))
            colour = "213,94,0" if value > 0 else "0,114,178"
            cells.append(f'<td style="background:rgba({colour},{0.75 * abs(value) / strongest:.2f})">{value:.3f}</td>')
        rows.append(f"<tr><th>{text(key[1])}, {text(_ENDS[key[0], key[2]])}</th>{''.join(cells)}</tr>")
    head_cells = "".join(f"<th>{_head(each)}</th>" for each in columns)
    return body + (
        f'<div class="scroll"><table class="heat"><thead><tr><th>layer.head</th>{head_cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _head(head: tuple[int, int]) -> str:
    return f"{head[0] + 1}.{head[1] + 1}"


def _interval(found: Estimate, *, signed: bool = False) -> str:
    width = "" if math.isnan(found.half_width) else f" ± {found.half_width:.3f}"
    return f"{_rounded(found.mean):{'+' if signed else ''}.3f}{width}"


def _rounded(value: float) -> float:
    """To three places, and never -0."""
    return round(value, 3) + 0.0


def _rephrasing(models: Mapping[str, TrainModule], material: _Material) -> str:
    answering = {
        label: (model, objective.held_out())
        for label, model in models.items()
        for objective in model.objectives.values()
        if isinstance(objective, AnswerScoring) and objective.name == "vqa"
    }
    if not answering:
        return note("None of the runs answers questions.")
    if not material.questions:
        return note("The set has no questions of the kinds that can be rephrased.")
    found = {
        label: robustness(model, objective, material.questions)
        for label, (model, objective) in answering.items()
        if isinstance(objective, AnswerScoring)
    }
    example = material.questions[0]
    body = paragraph(
        f"{len(material.questions):,} questions, each as it was asked and in {FORMS - 1} other forms with the same "
        f"answer, made of words that training uses: such as “{example.texts[0]}”, “{'”, “'.join(example.texts[1:])}”.",
        "CS(k), the consensus score of VQA-Rephrasings: of all choices of k of the forms of a question, the share in "
        "which every form is answered rightly, averaged over questions. CS(1) is the accuracy over all forms.",
    )
    if material.unknown:
        body += note(
            f"{material.unknown:,} more questions are of no known kind, or a form has a word that is no word piece."
        )
    header = ("run", "as asked", "other forms", *(f"CS({k})" for k in range(1, FORMS + 1)))
    rows = [
        (label, _interval(each.original), _interval(each.others), *map(_interval, each.consensus))
        for label, each in found.items()
    ]
    body += table(header, rows, "accuracy, with 95% confidence intervals over images")
    kinds = list(next(iter(found.values())).by_kind)
    per_kind = [
        (kind, f"{next(iter(found.values())).by_kind[kind][0].count:,}", *(
            cell for each in found.values() for cell in map(_interval, each.by_kind[kind])
        )) for kind in kinds
    ]  # fmt: skip
    named = [name for label in found for name in (f"{label}, as asked", f"{label}, other forms")]
    return body + table(("kind of question", "questions", *named), per_kind, "accuracy by kind of question")


def _made(runs: Sequence[TrainedRun], material: _Material, command: str, notes: _Notes) -> str:
    manifest = material.manifest
    rows = [
        ("command", Markup(f"<code>{text(command)}</code>")),
        ("looked into", f"{manifest.store}: the first {material.images:,} of {manifest.num_groups:,} image groups"),
        ("fingerprint of the set", manifest.fingerprint),
        ("source of the set", manifest.source),
        *((f"checkpoint of {run.label}", str(run.checkpoint)) for run in runs),
        *(
            (
                f"trained with ({run.label})",
                ", ".join(f"{name} {value}" for name, value in run.state["versions"].items()),
            )
            for run in runs
        ),
        ("made with", f"villa_ds {__version__}, torch {torch.__version__}, python {platform.python_version()}"),
        *(
            (
                f"attention of {label}",
                f"recomputed; the contexts that follow from it differ from the model's by at most {value:.1e}",
            )
            for label, value in notes.deviations.items()
        ),
    ]
    return table(("what", "how"), rows, numbers_from=2)
