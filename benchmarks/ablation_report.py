"""Tables and pictures of the cells that `ablation.py` left behind: intervals, paired differences, how many comparisons.

A cell's numbers depend on the pre-training that it started from. The table is of one pre-training seed, the lowest that
there are cells of, so that its intervals are over fine-tuning seeds alone; what several pre-trainings differ in has a
table of its own, in which each pre-training counts as one observation.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import record
from ablation_settings import BASELINE, STUDY, TASKS, VARIANTS, VQA, Task, Variant
from scipy.stats import false_discovery_control
from scipy.stats import t as student

from villa_ds.files import replace_file
from villa_ds.pictures import INK, MUTED, PALETTE, picture

Cells = Sequence[Mapping[str, Any]]

CONFIDENCE = 0.95
DRAWN_FROM = 3  # seeds: the interval of two is too wide to be looked at beside others
CURVE_STEPS = 10  # optimizer steps that a point of a stored curve is the mean of
STUDY_STEPS = 40  # last optimizer steps that the study's training losses are the mean of
AGAINST = {variant.name: variant.against for variant in VARIANTS}
EQUAL_STEPS = tuple(variant.name for variant in VARIANTS if variant.steps_factor == 1 and variant.name != BASELINE)
# Colour says how fine-tuning goes, dashes that pre-training was adversarial; variants not here lie on `villa-fine`.
CURVES: dict[str, dict[str, Any]] = {
    "uniter": {"color": PALETTE[0]},
    "villa-pre": {"color": PALETTE[0], "linestyle": "--"},
    "villa-fine": {"color": PALETTE[1]},
    "villa": {"color": PALETTE[1], "linestyle": "--"},
    "uniter-compute": {"color": PALETTE[2]},
    "villa-fine-long": {"color": PALETTE[3]},
    "villa-fine-long-5x": {"color": PALETTE[4]},
}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval (Student's t; nan for a single value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread


def chance(values: Sequence[float]) -> float:
    """Two-sided p of Student's t-test that the mean is zero; nan for a single value."""
    if len(values) < 2:
        return math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    mean = abs(statistics.fmean(values))
    if spread == 0:
        return float(mean == 0)
    return 2 * float(student.sf(mean / spread, len(values) - 1))


def scores(cells: Cells, split: str) -> dict[str, dict[str, dict[int, float]]]:
    """Task -> variant -> seed -> score."""
    metric = {task.name: task.metric for task in (*TASKS, *(task for task, _ in STUDY))}
    found: dict[str, dict[str, dict[int, float]]] = {}
    for cell in cells:
        by_seed = found.setdefault(cell["task"], {}).setdefault(cell["variant"], {})
        by_seed[cell["seed"]] = cell[split][metric[cell["task"]]]
    return found


def of_pretraining(cells: Cells, seed: int) -> list[Mapping[str, Any]]:
    """The cells that started from this pre-training seed."""
    return [cell for cell in cells if cell["pretrain_seed"] == seed]


def pretrain_seeds(cells: Cells) -> list[int]:
    """Seeds of the pre-trainings that cells started from, ascending."""
    return sorted({cell["pretrain_seed"] for cell in cells})


def summary(cells: Cells) -> dict[str, Any]:
    """Per task and variant of cells of one pre-training seed: mean and interval of each split, and of differences.

    Differences are paired by seed, from the variant that this one is held against, with their `p`.
    """
    table: dict[str, Any] = {}
    for split in ("test", "validation"):
        for task, variants in scores(cells, split).items():
            for variant, by_seed in variants.items():
                row = table.setdefault(task, {}).setdefault(variant, {})
                mean, half = interval(list(by_seed.values()))
                row[split] = {"mean": mean, "half_width": half, "seeds": sorted(by_seed)}
                row[split] |= difference(by_seed, variants.get(AGAINST[variant], {})) if variant != BASELINE else {}
    return table


def difference(own: Mapping[int, float], base: Mapping[int, float]) -> dict[str, Any]:
    """Mean and interval of the differences of two variants seed by seed; empty without a seed that both have."""
    shared = sorted(base.keys() & own.keys())
    if not shared:
        return {}
    values = [own[seed] - base[seed] for seed in shared]
    mean, half = interval(values)
    return {"difference": mean, "difference_half_width": half, "p": chance(values), "paired_seeds": shared}


def comparisons(table: Mapping[str, Any]) -> dict[str, Any]:
    """How many differences at equal steps the test table makes, how many intervals leave out zero, and how many should.

    `surviving` are those that are left at a false discovery rate of 5% (Benjamini and Hochberg); the variants of one
    task share a baseline, so that their differences go together, which that procedure allows.
    """
    found = {
        f"{task} {variant}": row[variant]["test"]
        for task, row in table.items()
        for variant in EQUAL_STEPS
        if not math.isnan(row.get(variant, {}).get("test", {}).get("p", math.nan))
    }
    if not found:
        return {"made": 0, "clear": [], "expected_by_chance": 0.0, "surviving": []}
    adjusted = false_discovery_control([entry["p"] for entry in found.values()])
    return {
        "made": len(found),
        "clear": [name for name, entry in found.items() if entry["p"] < 1 - CONFIDENCE],
        "expected_by_chance": (1 - CONFIDENCE) * len(found),
        "surviving": [name for name, p in zip(found, adjusted, strict=True) if p < 1 - CONFIDENCE],
    }


def over_pretrainings(cells: Cells) -> dict[str, Any]:
    """Per task and variant that more than one pre-training seed has cells of: means by pre-training, and over them.

    Fine-tuning seeds are those that the variant and the baseline have after every pre-training. A pre-training's mean
    over them is one observation of the interval, which so covers both kinds of seed.
    """
    found: dict[str, Any] = {}
    by_pretraining = {seed: scores(of_pretraining(cells, seed), "test") for seed in pretrain_seeds(cells)}
    for task in (task.name for task in TASKS):
        for variant in (variant.name for variant in VARIANTS):
            runs = {
                seed: (table[task][variant], table[task][BASELINE])
                for seed, table in by_pretraining.items()
                if variant in table.get(task, {}) and BASELINE in table[task]
            }
            shared = set.intersection(*(own.keys() & base.keys() for own, base in runs.values())) if runs else set()
            if len(runs) < 2 or not shared:
                continue
            means = {seed: statistics.fmean(own[s] for s in shared) for seed, (own, _) in runs.items()}
            gains = {seed: statistics.fmean(own[s] - base[s] for s in shared) for seed, (own, base) in runs.items()}
            mean, half = interval(list(means.values()))
            row = {"mean": mean, "half_width": half, "seeds": sorted(shared), "means": means}
            if variant != BASELINE:
                mean, half = interval(list(gains.values()))
                row |= {"differences": gains, "difference": mean, "difference_half_width": half}
            found.setdefault(task, {})[variant] = row
    return found


def markdown(table: Mapping[str, Any], cells: Cells) -> str:
    """Test scores in percent with intervals and paired differences; how many comparisons that is; what runs cost."""
    tasks = [task.name for task in TASKS if task.name in table]
    lines = ["| variant | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for variant in VARIANTS:
        entries = [table[task].get(variant.name, {}).get("test") for task in tasks]
        if any(entries):
            lines.append(f"| `{variant.name}`: {variant.says} | " + " | ".join(map(_entry, entries)) + " |")
    return "\n".join([*lines, "", _said_of_comparisons(table), "", _cost(cells), ""])


def _entry(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    text = _points(entry["mean"], entry["half_width"])
    if "difference" in entry:
        text += f" ({_difference(entry)})"
    return f"{text}, n = {len(entry['seeds'])}"


def _points(value: float, half_width: float, sign: str = "") -> str:
    """In points of a hundred."""
    return f"{100 * value:{sign}.1f}" + ("" if math.isnan(half_width) else f" ± {100 * half_width:.1f}")


def _difference(entry: Mapping[str, Any]) -> str:
    """In bold where the interval leaves out zero."""
    text = _points(entry["difference"], entry["difference_half_width"], "+")
    return f"**{text}**" if abs(entry["difference"]) > entry["difference_half_width"] else text


def _said_of_comparisons(table: Mapping[str, Any]) -> str:
    found = comparisons(table)
    return (
        f"At equal steps {found['made']} differences from `{BASELINE}`; the intervals of {len(found['clear'])} leave "
        f"out zero ({_list(found['clear'])}); chance alone would make some {found['expected_by_chance']:.1f} do so. "
        f"At a false discovery rate of 5% there remain: {_list(found['surviving'])}."
    )


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _cost(cells: Cells) -> str:
    """CPU time in that of the baseline with the same task and seed."""
    timed = [cell for cell in cells if cell["cpu_s"] is not None]
    of_baseline = {(cell["task"], cell["seed"]): cell["cpu_s"] for cell in timed if cell["variant"] == BASELINE}
    factors = {
        variant.name: [
            cell["cpu_s"] / of_baseline[cell["task"], cell["seed"]]
            for cell in timed
            if cell["variant"] == variant.name and (cell["task"], cell["seed"]) in of_baseline
        ]
        for variant in VARIANTS
    }
    said = ", ".join(f"{name} {statistics.median(found):.1f}" for name, found in factors.items() if found)
    return (
        f"CPU time of a run, evaluation included, in that of `{BASELINE}` with the same task and seed (median): {said}."
    )


def pretraining_markdown(table: Mapping[str, Any]) -> str:
    """For each task a table: a variant's mean and difference after each pre-training, and intervals over them."""
    lines = []
    for task, variants in table.items():
        seeds = list(next(iter(variants.values()))["means"])
        lines += [
            f"| {task} | " + " | ".join(f"pre-training {seed}" for seed in seeds) + " | over pre-trainings |",
            "|---" * (len(seeds) + 2) + "|",
        ]
        for variant, row in variants.items():
            gains = row.get("differences", {})
            columns = [
                f"{100 * row['means'][seed]:.1f}" + (f" ({100 * gains[seed]:+.1f})" if seed in gains else "")
                if seed in row["means"]
                else ""
                for seed in seeds
            ]
            whole = _points(row["mean"], row["half_width"])
            if "difference" in row:
                whole += f" ({_difference(row)})"
            fine = ", ".join(map(str, row["seeds"]))
            lines.append(f"| `{variant}`, fine-tuning seeds {fine} | " + " | ".join([*columns, whole]) + " |")
        lines.append("")
    return "\n".join(lines)


def study_rows(study: Cells, cells: Cells) -> list[dict[str, Any]]:
    """The study's settings in order, with the runs of the table that they are held against first."""
    seeds = {cell["seed"] for cell in study}
    borrowed = [
        c for c in cells if c["task"] == VQA.name and c["variant"] in (BASELINE, "villa-fine") and c["seed"] in seeds
    ]
    rows = []
    for task, variants in STUDY:
        own = [Variant(BASELINE, "no adversary"), Variant("villa-fine", "the recipe")] if task is VQA else []
        found = scores([*study, *borrowed], "validation").get(task.name, {})
        for variant in (*own, *variants):
            runs = [c for c in (*study, *borrowed) if (c["task"], c["variant"]) == (task.name, variant.name)]
            if not runs:
                continue
            mean, half = interval([run["validation"][task.metric] for run in runs])
            last = STUDY_STEPS // CURVE_STEPS
            row = {
                "task": task.name,
                "setting": variant.name,
                "says": variant.says,
                "seeds": sorted(run["seed"] for run in runs),
                "training_loss": statistics.fmean(statistics.fmean(run["losses"][-last:]) for run in runs),
                "validation_loss": statistics.fmean(run["validation"]["loss"] for run in runs),
                "mean": mean,
                "half_width": half,
            }
            if all("divergences" in run for run in runs):
                row["divergence"] = statistics.fmean(statistics.fmean(run["divergences"][-last:]) for run in runs)
            if variant.name != variant.against:
                row |= {"against": variant.against, **difference(found[variant.name], found.get(variant.against, {}))}
            rows.append(row)
    return rows


def study_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Validation scores of the study in percent; losses of training are of the last steps."""
    lines = [
        "| task | setting | training loss | validation loss | divergence | validation score | difference | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        divergence = f"{row['divergence']:.4f}" if "divergence" in row else ""
        gain = f"{_difference(row)} from `{row['against']}`" if "difference" in row else ""
        lines.append(
            f"| {row['task']} | `{row['setting']}`: {row['says']} | {row['training_loss']:.2f} | "
            f"{row['validation_loss']:.2f} | {divergence} | {_points(row['mean'], row['half_width'])} | {gain} | "
            f"{len(row['seeds'])} |"
        )
    return "\n".join([*lines, ""])


def draw_differences(table: Mapping[str, Any], path: Path) -> None:
    """Differences from the baseline at equal steps with their intervals, a panel for each task."""
    shown = {
        task: {
            place: entry
            for place, name in enumerate(EQUAL_STEPS)
            if len((entry := table.get(task.name, {}).get(name, {}).get("test", {})).get("paired_seeds", []))
            >= DRAWN_FROM
        }
        for task in TASKS
    }
    shown = {task: entries for task, entries in shown.items() if entries}
    if not shown:
        return
    subtitle = (
        f"Points of the test metric above {BASELINE} at equal steps, seed by seed: mean and 95% confidence interval\n"
        f"Scales differ; left out is what fewer than {DRAWN_FROM} seeds say"
    )
    with picture(path, "What the adversary is worth", subtitle, len(shown), columns=3) as panels:
        for axes, (task, entries) in zip(panels, shown.items(), strict=True):
            for place, entry in entries.items():
                half = 100 * entry["difference_half_width"]
                axes.errorbar(100 * entry["difference"], place, xerr=half, fmt="o", capsize=3, color=PALETTE[0])
            axes.axvline(0, color=INK, linewidth=1)
            furthest = 105 * max(
                abs(entry["difference"]) + entry["difference_half_width"] for entry in entries.values()
            )
            axes.set(
                title=f"{task.name}, {task.metric}", xlim=(-furthest, furthest), ylim=(len(EQUAL_STEPS) - 0.5, -0.5)
            )
            axes.set_yticks(range(len(EQUAL_STEPS)), EQUAL_STEPS)
            axes.tick_params(axis="y", labelcolor=MUTED)


def draw_curves(cells: Cells, task: Task, path: Path) -> None:
    """Validation score and training loss over the steps: mean of the seeds, their range as a band."""
    own = [cell for cell in cells if cell["task"] == task.name]
    seeds = sorted({cell["seed"] for cell in own})
    subtitle = f"Validation {task.metric} and training loss, mean and range over seeds {', '.join(map(str, seeds))}"
    with picture(path, f"{task.name} on the demo benchmark", subtitle, 2) as (left, right):
        for variant, look in CURVES.items():
            runs = [cell for cell in own if cell["variant"] == variant]
            if not runs:
                continue
            label = variant if len(runs) == len(seeds) else f"{variant} (n = {len(runs)})"
            band(left, [cell["curve"] for cell in runs], label, look)
            losses = [[[CURVE_STEPS * (n + 1), loss] for n, loss in enumerate(cell["losses"])] for cell in runs]
            band(right, losses, variant, look)
        left.set(xlabel="optimizer step", ylabel=f"validation {task.metric}")
        right.set(xlabel="optimizer step", ylabel="training loss of the clean pass", yscale="log")
        left.legend(fontsize=8)


def band(axes: Any, curves: Sequence[Sequence[Sequence[float]]], label: str, look: Mapping[str, Any]) -> None:
    """Mean of curves over the same steps, and their range."""
    by_step = [{int(step): value for step, value in curve} for curve in curves]
    steps = sorted(set.intersection(*map(set, by_step)))
    columns = [[values[step] for values in by_step] for step in steps]
    axes.plot(steps, [statistics.fmean(column) for column in columns], label=label, **look)
    axes.fill_between(steps, list(map(min, columns)), list(map(max, columns)), alpha=0.12, color=look["color"], lw=0)


def read(folder: Path) -> list[Mapping[str, Any]]:
    """All cells below a folder, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/*/pretrain-*-seed-*.json"))]


def tables(results: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What the cells say, as data for `table.json` and as texts by file name."""
    cells, study = read(results / "cells"), read(results / "study")
    data: dict[str, Any] = {}
    texts = {}
    if cells:
        chosen = pretrain_seeds(cells)[0]
        table, pretrainings = summary(of_pretraining(cells, chosen)), over_pretrainings(cells)
        data |= {
            "pretrain_seed": chosen,
            "table": table,
            "comparisons": comparisons(table),
            "over_pretrainings": pretrainings,
        }
        texts["table.md"] = markdown(table, of_pretraining(cells, chosen))
        if pretrainings:
            texts["pretrainings.md"] = pretraining_markdown(pretrainings)
    if study:
        data["study"] = study_rows(study, of_pretraining(cells, pretrain_seeds(study)[0]))
        texts["study.md"] = study_markdown(data["study"])
    return data, texts


def strict(data: Any) -> Any:
    """The same with null for what is no number, such as the interval of a single seed: JSON knows no NaN."""
    if isinstance(data, Mapping):
        return {str(key): strict(value) for key, value in data.items()}
    if isinstance(data, list):
        return [strict(value) for value in data]
    return None if isinstance(data, float) and math.isnan(data) else data


def report(results: Path) -> None:
    """Write tables and pictures of all cells that are there, and print the tables."""
    data, texts = tables(results)
    if not data:
        print(f"no finished cells in {results}")
        return
    content = strict({"environment": record.environment(("scipy",)), **data})
    replace_file(results / "table.json", (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    for name, text in texts.items():
        replace_file(results / name, text.encode())
        print(text)
    if "table" in data:
        cells = of_pretraining(read(results / "cells"), data["pretrain_seed"])
        draw_differences(data["table"], results / "differences.png")
        for task in TASKS:
            if task.name in data["table"]:
                draw_curves(cells, task, results / f"curves-{task.name}.png")
