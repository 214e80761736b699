"""`villa-ds report`: trained runs side by side in one HTML file that needs nothing else.

What was compared, held-out results, training curves, attention maps, probing of the heads, rephrased questions.
"""

import json
import math
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from villa_ds import __version__
from villa_ds.analysis.curves import SPAN, Panel, draw, draw_one
from villa_ds.analysis.intervals import Estimate
from villa_ds.analysis.looking import Found, Inside, compared_links, grouped, look
from villa_ds.analysis.maps import definition, drawn_table
from villa_ds.analysis.numbers import ENDS, head_name, numbers
from villa_ds.analysis.page import Markup, Section, details, figures, note, page, paragraph, table, text
from villa_ds.analysis.probing import COREFERENCE, RELATION, Key, Weights
from villa_ds.analysis.rephrasing import FORMS
from villa_ds.analysis.runs import TrainedRun, open_runs
from villa_ds.analysis.table import cells_of
from villa_ds.errors import ConfigError
from villa_ds.files import replace_file
from villa_ds.mapping import to_mapping
from villa_ds.train.rundir import FREE_KEYS, differences

NUMBERS_SUFFIX = ".json"


def report(named: Sequence[str], out: Path, inside: Inside, command: str, device: str | None = None) -> Path:
    """Write the report of runs, each PATH or LABEL=PATH, to `out`, and its numbers as JSON beside it.

    ConfigError, CheckpointError or DataError if a run cannot be read, or does not fit the shard set.
    """
    if out.suffix == NUMBERS_SUFFIX:
        raise ConfigError(f"--out {out}: is the page's name, and the numbers go beside it: give one that ends in .html")
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder: give the name of a file in it, such as {out / 'report.html'}")
    found = look(open_runs(named), inside, device)
    runs = [run.label for run in found.runs]
    made = {
        "made_with": f"villa_ds {__version__}, torch {torch.__version__}, python {platform.python_version()}",
        "command": command,
    }
    sections = [
        Section("compared", "What was compared", _compared(found)),
        Section("results", "Held-out results", _held_out(found)),
        Section("curves", "Training curves", _curves(found)),
        Section("attention", "Attention maps", _attention(found)),
        Section("probing", "Probing of the heads", _probing(found)),
        Section("rephrasing", "Rephrased questions", _rephrasing(found)),
        Section("made", "How this was made", _made(found, made)),
    ]
    lead = paragraph(
        f"{' beside '.join(runs)}: how they were trained, what they score, what their attention "
        "looks at, and how they take questions put in other words."
    )
    if inside.curves is not None:
        draw({run.label: run.rows() for run in found.runs}, inside.curves)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, page("Looking inside trained runs", lead, sections).encode())
    content = json.dumps(numbers(found) | made, indent=1, ensure_ascii=False, allow_nan=False)
    replace_file(out.with_suffix(NUMBERS_SUFFIX), f"{content}\n".encode())
    return out


# Sections -------------------------------------------------------------------------------------------------------------


def _compared(found: Found) -> str:
    rows = []
    for run in found.runs:
        phases = "; ".join(
            f"{phase.steps} {'standard' if phase.adversary is None else 'adversarial'}" for phase in run.recipe.phases
        )
        millions = found.parameters[run.label] / 1e6
        rows.append((run.label, run.recipe.name, ", ".join(run.tasks), phases, f"{run.step:,}", f"{millions:.2f}"))
    body = table(("run", "recipe", "tasks", "optimizer steps", "checkpoint", "million parameters"), rows, "", 4)
    for tasks, group in grouped(found.runs).items():
        changed = _differing(group)
        if changed:
            body += f"<h3>Where the recipes for {text(', '.join(tasks))} differ</h3>"
            body += table(("key", *(run.label for run in group)), changed, numbers_from=len(group) + 1)
        elif len(group) > 1:
            body += note(f"The recipes for {', '.join(tasks)} are the same, but for where they lie.")
    return body


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


def _held_out(found: Found) -> str:
    told = {row.run for row in found.results}
    missing = [run.label for run in found.runs if run.label not in told]
    body = table(*cells_of(found.results), numbers_from=2) if told else ""
    body += note(
        "The newest villa-ds evaluate of each run counts; without one, the validation at its end.",
        "The majority baseline always gives the commonest answer.",
    )
    return body + (note(f"Not evaluated: {', '.join(missing)}.") if missing else "")


def _curves(found: Found) -> str:
    body = note(
        f"Faint: every optimizer step; line: mean, weighted over 1/{SPAN} of the run to either side.",
        "Dashed: where a phase begins.",
    )
    order = [run.label for run in found.runs]
    with tempfile.TemporaryDirectory(prefix="villa-ds-") as scratch:
        for tasks, panels in found.curves:
            drawn = []
            for panel in panels:
                path = draw_one(panel, order, Path(scratch) / "panel.png")
                drawn.append(
                    (
                        path.read_bytes(),
                        f"{panel.name} of {', '.join(each.run for each in panel.series)}",
                    )
                )
            if len(found.curves) > 1:
                body += f"<h3>{text(', '.join(tasks))}</h3>"
            body += figures(drawn) if drawn else note("No metrics.jsonl beside the checkpoint: no curves.")
            body += details("Where they end", _ends(panels)) if panels else ""
    return body


def _ends(panels: Sequence[Panel]) -> str:
    rows = [
        (panel.name, series.run, f"{int(series.steps[-1]):,}", f"{series.values[-1]:.4g}", f"{series.smoothed[-1]:.4g}")
        for panel in panels
        for series in panel.series
    ]
    return table(("", "run", "last step", "value", "mean"), _without_repeats(rows, 1), numbers_from=2)


def _attention(found: Found) -> str:
    body = note(
        "Each map shows how much of its attention a word piece gives to each region: the brighter, the more.",
        "Rows are layers of each run, averaged over heads; folded below, the heads of one word (layer.head).",
        "Green frame: the region of the thing that the word is about, where that is known.",
    )
    for each in found.drawn:
        shown = each.shown
        body += f"<h3>“{text(each.text)}”</h3>" + definition(shown) + note(each.image) + drawn_table(shown, each.words)
        body += details(f"All heads, for “{shown.pieces[each.described]}”", drawn_table(shown, each.heads))
    return body


def _probing(found: Found) -> str:
    probes, weights = found.material.probes, found.links
    if not probes:
        return note("What the images of this set show is not known, so there is nothing to hold attention against.")
    body = paragraph(
        f"{len(probes):,} texts made for {len({each.image for each in probes}):,} images whose truth "
        "is known. Coreference: the largest attention between a word and the region of the thing that it is about.",
        "Relation: the attention between the regions of two things of which the text says how they stand.",
        "Heads are chosen on every other image and scored on the rest; intervals are 95% over images.",
    )
    keys = list(next(iter(weights.values())))
    if not keys:
        return body + note("There are too few of these images.")
    body += _largest_table(keys, weights)
    pairs = [(run.label, group[0].label) for group in grouped(found.runs).values() for run in group[1:]]
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
    for label, own_links in weights.items():
        body += details(f"All heads of {label}", _heat(own_links))
    return body


def _largest_table(keys: Sequence[Key], weights: Mapping[str, Mapping[Key, Weights]]) -> str:
    rows = []
    for key in keys:
        scores = [found[key].largest() for found in weights.values()]
        cells = [f"{_interval(score.right)} ({head_name(score.head)})" for score in scores]
        rows.append((key[0], key[1], ENDS[key[0], key[2]], *cells, f"{scores[0].uniform:.3f}"))
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
            cells.append(_interval(compared_links(weights[label][key], weights[base][key]), signed=True))
        rows.append((key[0], key[1], ENDS[key[0], key[2]], *cells))
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
            rows.append((key[1], ENDS[key[0], key[2]], label, head_name(score.head), *values, *shares))
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
    means = {key: each.above() for key, each in found.items()}
    strongest = max(float(np.abs(each).max()) for each in means.values()) or 1.0
    columns = [(layer, head) for layer in range(layers) for head in range(heads)]
    rows = []
    for key, mean in means.items():
        cells = []
        for layer, head in columns:
            value = _rounded(float(mean[layer, head]))
            colour = "213,94,0" if value > 0 else "0,114,178"
            cells.append(f'<td style="background:rgba({colour},{0.75 * abs(value) / strongest:.2f})">{value:.3f}</td>')
        rows.append(f"<tr><th>{text(key[1])}, {text(ENDS[key[0], key[2]])}</th>{''.join(cells)}</tr>")
    head_cells = "".join(f"<th>{head_name(each)}</th>" for each in columns)
    return body + (
        f'<div class="scroll"><table class="heat"><thead><tr><th>layer.head</th>{head_cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _interval(found: Estimate, *, signed: bool = False) -> str:
    width = "" if math.isnan(found.half_width) else f" ± {found.half_width:.3f}"
    return f"{_rounded(found.mean):{'+' if signed else ''}.3f}{width}"


def _rounded(value: float) -> float:
    """To three places, and never -0."""
    return round(value, 3) + 0.0


def _rephrasing(looked: Found) -> str:
    if not looked.answering:
        return note("None of the runs answers questions.")
    material, found = looked.material, looked.robustness
    if not found:
        return note("The set has no questions of the kinds that can be rephrased.")
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


def _made(found: Found, made: Mapping[str, str]) -> str:
    manifest = found.material.manifest
    looked_at = f"the first {found.material.images:,} of {manifest.num_groups:,} image groups"
    rows = [
        ("command", Markup(f"<code>{text(made['command'])}</code>")),
        ("looked into", f"{manifest.store}: {looked_at}"),
        ("fingerprint of the set", manifest.fingerprint),
        ("source of the set", manifest.source),
        *((f"checkpoint of {run.label}", str(run.checkpoint)) for run in found.runs),
        *(
            (
                f"trained with ({run.label})",
                ", ".join(f"{name} {value}" for name, value in run.state["versions"].items()),
            )
            for run in found.runs
        ),
        ("made with", made["made_with"]),
        *(
            (
                f"attention of {label}",
                f"recomputed; the contexts that follow from it differ from the model's by at most {value:.1e}",
            )
            for label, value in found.deviations.items()
        ),
    ]
    return table(("what", "how"), rows, numbers_from=2)
