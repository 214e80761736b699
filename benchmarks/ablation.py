"""The paper's ablation (its Tables 2 and 3) on the demo benchmark: what the adversary is worth, where, and which one.

    villa-ds shards demo SHARDS --benchmark
    python benchmarks/ablation.py SHARDS WORK [--seeds 1 2 3 4 5] [--tasks ve ...] [--variants villa ...]
    python benchmarks/ablation.py SHARDS WORK --report

Pre-trains twice, without and with an adversarial last phase (equal steps), then fine-tunes each task from these weights
in each variant with each seed, and evaluates on the validation and the test split. A *cell* is a task, a variant and a
seed; a finished one is a JSON file under `results/ablation/cells/`, and one that is there is not run again, so the
script can be stopped and started at will. WORK takes the runs; a fine-tuning run is deleted when its cell is written.
Every call ends with the report: `results/ablation/table.md`, `table.json` and the curves as PNG.

Settings are those of the shipped recipes, which were chosen on validation splits.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
from scipy.stats import t as student

from villa_ds.config import Recipe, load_recipe
from villa_ds.data.processes import in_order
from villa_ds.mapping import to_mapping
from villa_ds.pictures import PALETTE, picture
from villa_ds.resources import find_recipe
from villa_ds.train.loop import train
from villa_ds.train.predict import evaluate_checkpoint

FOLDER = record.RESULTS / "ablation"
CONFIDENCE = 0.95
BASELINE = "uniter"
CURVE_STEPS = 10  # optimizer steps that a point of a stored curve is the mean of
POINTS = 5  # validations of a run

PLAIN = ("phases.0.adversary=null",)
# In units of one forward pass: an adversarial step with K = 3 costs 10, a plain one 3 (docs/adversary.md).
COMPUTE = 10 / 3


@dataclass(frozen=True)
class Variant:
    """How a task is fine-tuned."""

    name: str
    says: str
    overrides: tuple[str, ...] = ()
    weights: str = "plain"  # of which pre-training
    steps_factor: float = 1.0


VARIANTS = (
    Variant("uniter", "plain pre-training, plain fine-tuning", PLAIN),
    Variant("uniter-compute", "the same, as many forward and backward passes as VILLA", PLAIN, steps_factor=COMPUTE),
    Variant("villa-pre", "adversarial pre-training only", PLAIN, weights="villa"),
    Variant("villa-fine", "adversarial fine-tuning only"),
    Variant("villa", "both", weights="villa"),
    Variant(
        "villa-fine-long", "adversarial fine-tuning only, as many steps as `uniter-compute`", steps_factor=COMPUTE
    ),
    Variant(
        "villa-fine-long-5x",
        "the same with steps five times as large",
        ("phases.0.adversary.text.step_size=0.02", "phases.0.adversary.image.step_size=0.1"),
        steps_factor=COMPUTE,
    ),
    Variant("text", "adversarial fine-tuning, text only", ("phases.0.adversary.modality=text",)),
    Variant("image", "adversarial fine-tuning, image only", ("phases.0.adversary.modality=image",)),
    Variant("alternate", "adversarial fine-tuning, text and image in turn", ("phases.0.adversary.modality=alternate",)),
    Variant(
        "freelb", "adversarial fine-tuning without divergence, uniform start",
        (
            "phases.0.adversary.kl_weight=0", "phases.0.adversary.init=uniform",
            "phases.0.adversary.text.init_norm=0.004", "phases.0.adversary.image.init_norm=0.02",
        ),
    ),
    Variant(
        "r3f", "random noise, no ascent, divergence only",
        (
            "phases.0.adversary.steps=1", "phases.0.adversary.init=normal", "phases.0.adversary.task_weight=0",
            "phases.0.adversary.clean_weight=1", "phases.0.adversary.text.init_norm=0.2",
            "phases.0.adversary.image.init_norm=1.0",
        ),
    ),
)  # fmt: skip
NAMES = tuple(variant.name for variant in VARIANTS)


@dataclass(frozen=True)
class Task:
    """A recipe, and which metric of which task of it counts."""

    name: str
    recipe: str
    folder: str
    result: str
    metric: str
    overrides: tuple[str, ...] = ()


TASKS = (
    # The first 300 scenes for longer: a regulariser shows where there is something to overfit.
    Task(
        "vqa", "demo-scenes-vqa", "scenes-vqa", "scenes-vqa/vqa", "score",
        ("data.sets.scenes-vqa=scenes-vqa/few", "phases.0.steps=300"),
    ),
    Task("ve", "demo-ve", "ve", "ve/ve", "accuracy", ("data.sets.ve=ve/few", "phases.0.steps=300")),
    Task("nlvr2", "demo-nlvr2", "nlvr2", "nlvr2/nlvr2", "accuracy"),
    Task("vcr", "demo-vcr", "vcr", "vcr/vcr", "accuracy"),
    Task("re", "demo-re", "re", "re/refexp", "accuracy"),
    Task("retrieval", "demo-retrieval", "retrieval", "retrieval/retrieval", "accuracy"),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run of the ablation."""

    shards: Path
    work: Path
    task: Task
    variant: Variant
    seed: int
    extra: tuple[str, ...]  # overrides for all, from the command line

    @property
    def path(self) -> Path:
        """Where its result is stored."""
        return FOLDER / "cells" / self.task.name / self.variant.name / f"seed-{self.seed}.json"

    def recipe(self) -> Recipe:
        """The task's recipe as this cell runs it."""
        source = find_recipe(self.task.recipe)
        chosen = [*self.task.overrides, *self.extra]
        steps = round(load_recipe(source, chosen).total_steps * self.variant.steps_factor)
        return load_recipe(
            source,
            [
                *chosen,
                f"data.root={self.shards}",
                f"output={self.work / '-'.join((self.task.name, self.variant.name, str(self.seed)))}",
                f"initialize={self.work / ('pretrain-' + self.variant.weights)}",
                f"seed={self.seed}",
                f"phases.0.steps={steps}",
                f"checkpoints.every={steps}",
                f"validation.every={max(steps // POINTS, 1)}",
                *self.variant.overrides,
            ],
        )


def pretrain(weights: str, shards: Path, work: Path) -> None:
    """The weights that fine-tuning starts from: a finished run under `work` is left as it is."""
    overrides = ["phases.1.adversary=null"] if weights == "plain" else []
    recipe = load_recipe(
        find_recipe("demo-scenes-pretrain"),
        [f"data.root={shards}", f"output={work / ('pretrain-' + weights)}", *overrides],
    )
    results = train(recipe)
    path = FOLDER / "cells" / f"pretrain-{weights}.json"
    if not path.exists():
        store(path, {"recipe": settings_of(recipe), "validation": results})


def run(cell: Cell) -> Cell:
    """Train and evaluate one cell, unless its result is there."""
    recipe = cell.recipe()
    if cell.path.exists():
        return cell
    started = time.process_time()
    validation = train(recipe)
    name = cell.task.folder
    on_test = load_recipe(
        find_recipe(cell.task.recipe),
        [f"data.root={cell.shards}", f"output={recipe.output}", f"data.validation.{name}={name}/test"],
    )
    metrics = json.loads((evaluate_checkpoint(on_test, None) / "metrics.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (recipe.run_directory / "metrics.jsonl").read_text().splitlines()]
    loss = "loss" if "loss" in rows[0]["losses"] else "perturbed_loss"  # FreeLB takes no clean pass
    log = (recipe.run_directory / "log.txt").read_text(encoding="utf-8")
    pattern = rf"step (\d+)  validation/{cell.task.result} .* {cell.task.metric} ([\d.]+)"
    store(
        cell.path,
        {
            "task": cell.task.name,
            "variant": cell.variant.name,
            "seed": cell.seed,
            "recipe": settings_of(recipe),
            "validation": validation[cell.task.result],
            "test": metrics[cell.task.result],
            "losses": [
                statistics.fmean(row["losses"][loss] for row in rows[place : place + CURVE_STEPS])
                for place in range(0, len(rows), CURVE_STEPS)
            ],
            "curve": [[int(step), float(score)] for step, score in re.findall(pattern, log)],
            "cpu_s": time.process_time() - started,
            "commit": record.environment()["commit"],
        },
    )
    shutil.rmtree(recipe.run_directory)
    return cell


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What decides a run's numbers, without the folders of this machine."""
    settings = to_mapping(recipe)
    for key in ("output", "initialize"):
        settings.pop(key)
    settings["data"].pop("root")
    return settings


def store(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval (Student's t; nan for a single value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread


def scores(cells: Sequence[Mapping[str, Any]], split: str) -> dict[str, dict[str, dict[int, float]]]:
    """Task -> variant -> seed -> score."""
    metric = {task.name: task.metric for task in TASKS}
    found: dict[str, dict[str, dict[int, float]]] = {}
    for cell in cells:
        by_seed = found.setdefault(cell["task"], {}).setdefault(cell["variant"], {})
        by_seed[cell["seed"]] = cell[split][metric[cell["task"]]]
    return found


def summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per task and variant: mean and interval on both splits, and of the paired differences from the baseline."""
    table: dict[str, Any] = {}
    for split in ("test", "validation"):
        for task, variants in scores(cells, split).items():
            for variant, by_seed in variants.items():
                row = table.setdefault(task, {}).setdefault(variant, {})
                mean, half = interval(list(by_seed.values()))
                row[split] = {"mean": mean, "half_width": half, "seeds": sorted(by_seed)}
                base = variants.get(BASELINE, {})
                shared = sorted(base.keys() & by_seed.keys())
                if shared and variant != BASELINE:
                    mean, half = interval([by_seed[seed] - base[seed] for seed in shared])
                    row[split] |= {"difference": mean, "difference_half_width": half, "paired_seeds": shared}
    return table


def markdown(table: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    """Test scores in percent with intervals; below each the paired difference from the baseline."""
    tasks = [task.name for task in TASKS if task.name in table]
    lines = ["| variant | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for variant in VARIANTS:
        entries = [table[task].get(variant.name, {}).get("test") for task in tasks]
        if any(entries):
            lines.append(f"| `{variant.name}`: {variant.says} | " + " | ".join(map(_entry, entries)) + " |")
    cost = [f"{variant}: {statistics.median(c['cpu_s'] for c in cells if c['variant'] == variant):.0f} s"
            for variant in NAMES if any(c["variant"] == variant for c in cells)]  # fmt: skip
    return "\n".join(lines) + f"\n\nMedian CPU time of a run over all tasks: {', '.join(cost)}.\n"


def _entry(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    text = f"{100 * entry['mean']:.1f} ± {100 * entry['half_width']:.1f}"
    if "difference" in entry:
        clear = abs(entry["difference"]) > entry["difference_half_width"]
        difference = f"{100 * entry['difference']:+.1f} ± {100 * entry['difference_half_width']:.1f}"
        text += f" ({'**' + difference + '**' if clear else difference})"
    return f"{text}, n = {len(entry['seeds'])}"


def draw_curves(cells: Sequence[Mapping[str, Any]], task: Task) -> None:
    """Validation score and training loss over the steps: mean of the seeds, their range as a band."""
    own = [cell for cell in cells if cell["task"] == task.name]
    shown = [variant for variant in VARIANTS if any(cell["variant"] == variant.name for cell in own)]
    seeds = sorted({cell["seed"] for cell in own})
    subtitle = f"Validation {task.metric} and training loss, mean and range over seeds {', '.join(map(str, seeds))}"
    with picture(FOLDER / f"curves-{task.name}.png", f"{task.name} on the demo benchmark", subtitle, 2) as (
        left,
        right,
    ):
        for place, variant in enumerate(shown):
            runs = [cell for cell in own if cell["variant"] == variant.name]
            look = {"color": PALETTE[place % len(PALETTE)], "linestyle": ("-", "--", ":")[place // len(PALETTE)]}
            band(left, [cell["curve"] for cell in runs], variant.name, look)
            losses = [[[CURVE_STEPS * (n + 1), loss] for n, loss in enumerate(cell["losses"])] for cell in runs]
            band(right, losses, variant.name, look)
        left.set(xlabel="optimizer step", ylabel=f"validation {task.metric}")
        right.set(xlabel="optimizer step", ylabel="training loss of the clean pass (FreeLB: perturbed)", yscale="log")
        left.legend(fontsize=8)


def band(axes: Any, curves: Sequence[Sequence[Sequence[float]]], label: str, look: Mapping[str, Any]) -> None:
    """Mean of curves over the same steps, and their range."""
    by_step = [{int(step): value for step, value in curve} for curve in curves]
    steps = sorted(set.intersection(*map(set, by_step)))
    columns = [[values[step] for values in by_step] for step in steps]
    axes.plot(steps, [statistics.fmean(column) for column in columns], label=label, **look)
    axes.fill_between(steps, list(map(min, columns)), list(map(max, columns)), alpha=0.12, color=look["color"], lw=0)


def report() -> None:
    """Write table and curves of all cells that are there, and print the table."""
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("cells/*/*/seed-*.json"))]
    if not cells:
        print("no finished cells")
        return
    table = summary(cells)
    text = markdown(table, cells)
    store(FOLDER / "table.json", {"environment": record.environment(), "table": table})
    (FOLDER / "table.md").write_text(text, encoding="utf-8")
    for task in TASKS:
        if task.name in table:
            draw_curves(cells, task)
    print(text)


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--tasks", nargs="+", choices=[task.name for task in TASKS], default=[t.name for t in TASKS])
    parser.add_argument("--variants", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe key, for every cell")
    parser.add_argument("--report", action="store_true", help="only the report")
    parsed = parser.parse_args()
    if not parsed.report:
        variants = [variant for variant in VARIANTS if variant.name in parsed.variants]
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
        for weights in sorted({variant.weights for variant in variants}):
            pretrain(weights, parsed.shards, parsed.work)
        for number, handler in handlers.items():  # a run watches for signals; what follows it should end at once
            signal.signal(number, handler)
        cells = [
            Cell(parsed.shards.resolve(), parsed.work.resolve(), task, variant, seed, tuple(parsed.set))
            for seed in parsed.seeds
            for task in TASKS
            if task.name in parsed.tasks
            for variant in variants
        ]
        missing = [cell for cell in cells if not cell.path.exists()]
        for cell in in_order(run, missing, parsed.processes):
            print(f"finished {cell.task.name} {cell.variant.name} seed {cell.seed}", flush=True)
    report()


if __name__ == "__main__":
    main()
