"""The numbers of a report for other programs: JSON (docs/analysis.md has its keys)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from villa_ds.analysis.curves import Panel
from villa_ds.analysis.intervals import Estimate
from villa_ds.analysis.looking import Drawn, Found, compared_links, grouped
from villa_ds.analysis.maps import MapTable
from villa_ds.analysis.probing import BACKWARD, COREFERENCE, FORWARD, RELATION, HeadScore, Weights
from villa_ds.analysis.rephrasing import Robustness
from villa_ds.analysis.runs import TrainedRun

SCHEMA = 1
ENDS = {
    (COREFERENCE, FORWARD): "word to region",
    (COREFERENCE, BACKWARD): "region to word",
    (RELATION, FORWARD): "subject to object",
    (RELATION, BACKWARD): "object to subject",
}
_DIGITS = 6  # of an attention weight: there are thousands


def numbers(found: Found) -> dict[str, Any]:
    """All that the page tells in numbers, and what they are of. What is not finite is None."""
    material, manifest = found.material, found.material.manifest
    return {
        "schema": SCHEMA,
        "set": {
            "place": str(manifest.store), "fingerprint": manifest.fingerprint, "source": manifest.source,
            "groups": manifest.num_groups, "looked_at": material.images,
        },
        "runs": {run.label: _run(run, found) for run in found.runs},
        "results": [dataclasses.asdict(result) for result in found.results],
        "curves": [_curve(panel, tasks) for tasks, panels in found.curves for panel in panels],
        "attention": [_text(drawn) for drawn in found.drawn],
        "probing": _probing(found),
        "rephrasing": {
            "questions": len(material.questions), "not_rephrased": material.unknown,
            "runs": {label: _robustness(each) for label, each in found.robustness.items()},
        },
    }  # fmt: skip


def head_name(head: tuple[int, int]) -> str:
    """Layer and head, counted from 1."""
    return f"{head[0] + 1}.{head[1] + 1}"


def _run(run: TrainedRun, found: Found) -> dict[str, Any]:
    phases = [
        {"name": phase.name, "steps": phase.steps, "adversarial": phase.adversary is not None}
        for phase in run.recipe.phases
    ]
    return {
        "recipe": run.recipe.name, "tasks": list(run.tasks), "phases": phases, "step": run.step,
        "parameters": found.parameters[run.label], "checkpoint": str(run.checkpoint),
        "versions": run.state["versions"], "attention_deviation": _finite(found.deviations.get(run.label)),
    }  # fmt: skip


def _curve(panel: Panel, tasks: Sequence[str]) -> dict[str, Any]:
    ends = {
        series.run: {
            "step": int(series.steps[-1]), "value": _finite(series.values[-1]), "mean": _finite(series.smoothed[-1])
        }
        for series in panel.series
    }  # fmt: skip
    phases = [{"step": step, "name": name} for step, name in panel.phases]
    return {"quantity": panel.name, "unit": panel.unit, "tasks": list(tasks), "phases": phases, "ends": ends}


def _text(drawn: Drawn) -> dict[str, Any]:
    truth = [{"position": position, "region": region} for position, region in drawn.shown.truth.items()]
    return {
        "image": drawn.image, "text": drawn.text, "pieces": list(drawn.shown.pieces), "truth": truth,
        "by_word": _maps(drawn.words), "by_head": {"position": drawn.described, **_maps(drawn.heads)},
    }  # fmt: skip


def _maps(table: MapTable) -> dict[str, Any]:
    rows = [
        {
            "row": name,
            "to_regions": [[round(weight, _DIGITS) for weight in weights.tolist()] for _, weights in cells],
            "to_all_regions": [round(float(weights.sum()), _DIGITS) for _, weights in cells],
        }
        for name, cells in table.rows
    ]
    return {"columns": list(table.header), "fully_lit": table.strongest, "rows": rows}


def _probing(found: Found) -> dict[str, Any]:
    probes, links = found.material.probes, found.links
    keys = list(next(iter(links.values()), {}))
    pairs = [(run.label, group[0].label) for group in grouped(found.runs).values() for run in group[1:]]
    return {
        "texts": len(probes),
        "images": len({each.image for each in probes}),
        "links": [
            {
                "task": key[0], "link": key[1], "direction": ENDS[key[0], key[2]],
                "runs": {label: _weights(own[key]) for label, own in links.items()},
                "differences": [
                    {"run": label, "base": base, **_estimate(compared_links(links[label][key], links[base][key]))}
                    for label, base in pairs
                ],
            }
            for key in keys
        ],
    }  # fmt: skip


def _weights(weights: Weights) -> dict[str, Any]:
    return {
        "largest": _score(weights.largest()),
        "most_telling": _score(weights.most_telling()),
        "above_by_head": [[_finite(value) for value in layer] for layer in weights.above().tolist()],
    }


def _score(score: HeadScore) -> dict[str, Any]:
    return {
        "head": head_name(score.head), "weight": _estimate(score.right), "other_region": _estimate(score.other),
        "above": _estimate(score.above), "right_first": _estimate(score.hits), "chance": score.chance,
        "uniform": score.uniform,
    }  # fmt: skip


def _robustness(robust: Robustness) -> dict[str, Any]:
    kinds: Mapping[str, tuple[Estimate, Estimate]] = robust.by_kind
    return {
        "as_asked": _estimate(robust.original),
        "other_forms": _estimate(robust.others),
        "consensus": [_estimate(each) for each in robust.consensus],
        "by_kind": {
            kind: {"as_asked": _estimate(asked), "other_forms": _estimate(others)}
            for kind, (asked, others) in kinds.items()
        },
    }


def _estimate(found: Estimate) -> dict[str, Any]:
    return {"mean": _finite(found.mean), "half_width": _finite(found.half_width), "count": found.count}


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
