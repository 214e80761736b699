"""The paper's ablation (its Tables 2 and 3) on the demo benchmark: what the adversary is worth, where, and which one.

    villa-ds shards demo SHARDS --benchmark
    python benchmarks/ablation.py SHARDS WORK [--seeds 1 2 3 4 5] [--tasks ve ...] [--variants villa ...]
    python benchmarks/ablation.py SHARDS WORK --pretrain-seeds 42 43 44 --tasks vqa --variants uniter villa-pre villa
    python benchmarks/ablation.py SHARDS WORK --study --seeds 1 2 3
    python benchmarks/ablation.py SHARDS WORK --report

Pre-trains twice for each pre-training seed, without and with an adversarial last phase (equal steps), then fine-tunes
each task from these weights in each variant with each seed, and evaluates on the validation and the test split; VCR has
a second stage of pre-training between, plain or adversarial as the first. A *cell* is a task, a variant, a pre-training
seed and a seed of fine-tuning; a finished one is a JSON file under RESULTS/cells/, and one that is there is not run
again, so the script can be stopped and started at will. WORK takes the runs; a fine-tuning run is deleted when its cell
is written. Every call ends with the report of all cells that are there: RESULTS/table.md, pretrainings.md, study.md,
table.json and pictures. RESULTS is WORK/results; what is published is in `benchmarks/results/ablation`, and only a call
that names it (`--results`) adds to it.

Settings are those of the shipped recipes, which were chosen on validation splits; the study of single settings
(`--study`) looks at nothing else either, and writes its cells to RESULTS/study/.
"""

import argparse
import json
import re
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ablation_report
import record
from ablation_settings import STUDY, TASKS, VARIANTS, Task, Variant

from villa_ds.config import Recipe, load_recipe
from villa_ds.data.processes import in_order
from villa_ds.errors import ConfigError, VillaError
from villa_ds.files import replace_file
from villa_ds.mapping import to_mapping
from villa_ds.resources import find_recipe
from villa_ds.train.loop import train
from villa_ds.train.predict import evaluate_checkpoint

FIRST_STAGE = "demo-scenes-pretrain"
TABLE = tuple((task, VARIANTS) for task in TASKS)
POINTS = 5  # validations of a run
# What a recipe may differ in without a run's numbers being others.
WITHOUT_EFFECT = ("seed", "validation", "checkpoints", "log", "watch")


@dataclass(frozen=True)
class Places:
    """Where shards are read, runs are made, and results are kept."""

    shards: Path
    work: Path
    results: Path

    def pretraining(self, weights: str, seed: int, stage: str = FIRST_STAGE) -> Path:
        """The run of a stage whose weights fine-tuning, or the next stage, starts from."""
        return self.work / f"{name_of(stage)}-{weights}-{seed}"


def name_of(stage: str) -> str:
    """A stage's recipe in names of files."""
    return "pretrain" if stage == FIRST_STAGE else stage.removeprefix("demo-")


@dataclass(frozen=True)
class Cell:
    """One run of the ablation, or of the study."""

    places: Places
    task: Task
    variant: Variant
    pretrain_seed: int
    seed: int
    extra: tuple[str, ...]  # overrides for all, from the command line
    study: bool = False

    @property
    def path(self) -> Path:
        """Where its result is stored."""
        folder = self.places.results / ("study" if self.study else "cells") / self.task.name / self.variant.name
        return folder / f"pretrain-{self.pretrain_seed}-seed-{self.seed}.json"

    @property
    def stages(self) -> tuple[str, ...]:
        """Recipes of the pre-training before it, in order."""
        return (FIRST_STAGE, *filter(None, [self.task.second_stage]))

    def recipe(self) -> Recipe:
        """The task's recipe as this cell runs it."""
        source = find_recipe(self.task.recipe)
        chosen = [*self.task.overrides, *self.extra]
        steps = round(load_recipe(source, chosen).total_steps * self.variant.steps_factor)
        name = "-".join((self.task.name, self.variant.name, str(self.pretrain_seed), str(self.seed)))
        return load_recipe(
            source,
            [
                *chosen,
                f"data.root={self.places.shards}",
                f"output={self.places.work / (('study-' if self.study else '') + name)}",
                f"initialize={self.places.pretraining(self.variant.weights, self.pretrain_seed, self.stages[-1])}",
                f"seed={self.seed}",
                f"phases.0.steps={steps}",
                f"checkpoints.every={steps}",
                f"validation.every={max(steps // POINTS, 1)}",
                *self.variant.overrides,
            ],
        )


def pretraining(weights: str, seed: int, places: Places, extra: Sequence[str] = (), stage: str = FIRST_STAGE) -> Recipe:
    """The run whose weights fine-tuning starts from, with overrides from the command line.

    A second stage starts from the first, and is plain or adversarial as that.
    """
    chosen = [*extra, f"data.root={places.shards}", f"output={places.pretraining(weights, seed, stage)}"]
    if stage != FIRST_STAGE:
        chosen.append(f"initialize={places.pretraining(weights, seed)}")
    if weights == "plain":
        chosen.append("phases.1.adversary=null")
    return load_recipe(find_recipe(stage), [*chosen, f"seed={seed}"])


def pretrain(recipe: Recipe, path: Path) -> None:
    """Pre-train, unless the run is finished already; its settings and held-out results go to `path`."""
    if path.exists():
        require_same_settings(recipe, [path])
    results = train(recipe)
    if not path.exists():
        store(path, {"recipe": settings_of(recipe), "validation": results, "commit": record.environment()["commit"]})


def run(cell: Cell) -> Cell:
    """Train and evaluate one cell, unless its result is there."""
    if cell.path.exists():
        return cell
    recipe = cell.recipe()
    whole = not recipe.run_directory.exists()  # one that was stopped goes on, and its time is not known
    started = time.process_time()
    content = {
        "task": cell.task.name,
        "variant": cell.variant.name,
        "pretrain_seed": cell.pretrain_seed,
        "seed": cell.seed,
        "recipe": settings_of(recipe),
        "validation": train(recipe)[cell.task.result],
    }
    if not cell.study:
        name = cell.task.folder
        on_test = load_recipe(
            find_recipe(cell.task.recipe),
            [f"data.root={cell.places.shards}", f"output={recipe.output}", f"data.validation.{name}={name}/test"],
        )
        # All micro-batches, but with a limit: without one retrieval ranks its whole gallery, for minutes.
        written = evaluate_checkpoint(on_test, None, limit=sys.maxsize)
        metrics = json.loads((written / "metrics.json").read_text(encoding="utf-8"))
        content["test"] = metrics[cell.task.result]
    store(
        cell.path,
        {
            **content,
            **curves_of(recipe.run_directory, cell.task),
            "cpu_s": time.process_time() - started if whole else None,
            "commit": record.environment()["commit"],
        },
    )
    shutil.rmtree(recipe.run_directory)
    return cell


def curves_of(folder: Path, task: Task) -> dict[str, Any]:
    """What a run's logs say of its way: losses (and divergence, if any) as means of some steps, validation scores."""
    rows = [json.loads(line)["losses"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    loss = "loss" if "loss" in rows[0] else "perturbed_loss"  # FreeLB takes no clean pass
    log = (folder / "log.txt").read_text(encoding="utf-8")
    pattern = rf"step (\d+)  validation/{task.result} .* {task.metric} ([\d.]+)"
    curves = {
        key: [
            statistics.fmean(row[name] for row in rows[place : place + ablation_report.CURVE_STEPS])
            for place in range(0, len(rows), ablation_report.CURVE_STEPS)
        ]
        for key, name in (("losses", loss), ("divergences", "kl"))
        if name in rows[0]
    }
    return {**curves, "curve": [[int(step), float(score)] for step, score in re.findall(pattern, log)]}


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
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())


def require_same_settings(recipe: Recipe, stored: Iterable[Path]) -> None:
    """Results of other settings are not to be averaged with those of this recipe, under whatever seeds they were made.

    Compared are the keys that both have: older results lack what recipes did not have yet. ConfigError with the file
    and the keys.
    """
    own = settings_of(recipe)
    for path in stored:
        found = json.loads(path.read_text(encoding="utf-8"))["recipe"]
        keys = [key for key in _differing(found, own) if key.partition(".")[0] not in WITHOUT_EFFECT]
        if keys:
            raise ConfigError(
                f"{path} was made with other settings than this call's ({', '.join(keys)}): "
                "delete it, or name another folder (--results)"
            )


def _differing(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Dotted keys of values that differ, among the keys that both have; a list and what is missing count as a value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() & new.keys()):
            yield from _differing(old[key], new[key], f"{path}.{key}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, pair in enumerate(zip(old, new, strict=True)):
            yield from _differing(*pair, f"{path}.{place}")
    elif old != new:
        yield path


def cells_of(parsed: argparse.Namespace, places: Places) -> list[Cell]:
    """What was asked for, seed by seed, so that an early end leaves whole seeds."""
    chosen = [(task, variant) for task, variants in (STUDY if parsed.study else TABLE) for variant in variants]
    return [
        Cell(places, task, variant, pretrain_seed, seed, tuple(parsed.set), parsed.study)
        for pretrain_seed in parsed.pretrain_seeds
        for seed in parsed.seeds
        for task, variant in chosen
        if task.name in (parsed.tasks or [task.name]) and variant.name in (parsed.variants or [variant.name])
    ]


def run_missing(parsed: argparse.Namespace, places: Places) -> None:
    """Pre-train and run what has no result yet."""
    cells = cells_of(parsed, places)
    for cell in {(cell.task, cell.variant): cell for cell in cells}.values():
        require_same_settings(cell.recipe(), sorted(cell.path.parent.glob("*.json")))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    missing = [cell for cell in cells if not cell.path.exists()]
    wanted = {(cell.stages.index(stage), cell.variant.weights, cell.pretrain_seed, stage)
              for cell in missing for stage in cell.stages}  # fmt: skip
    for _, weights, seed, stage in sorted(wanted):
        path = places.results / "cells" / f"{name_of(stage)}-{weights}-{seed}.json"
        pretrain(pretraining(weights, seed, places, parsed.pretrain_set, stage), path)
    for number, handler in handlers.items():  # a run watches for signals; what follows it should end at once
        signal.signal(number, handler)
    for cell in in_order(run, missing, parsed.processes):
        print(f"finished {cell.path}", flush=True)


def _names(of: Iterable[Task | Variant]) -> list[str]:
    return list(dict.fromkeys(one.name for one in of))


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--results", type=Path, help="where cells and tables are (default: WORK/results)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--pretrain-seeds", type=int, nargs="+", default=[load_recipe(find_recipe(FIRST_STAGE)).seed])
    parser.add_argument("--tasks", nargs="+", choices=_names(task for task, _ in (*TABLE, *STUDY)), help="default: all")
    parser.add_argument(
        "--variants", nargs="+", choices=_names(one for _, variants in (*TABLE, *STUDY) for one in variants),
        help="default: all, or with --study all of its settings",
    )  # fmt: skip
    parser.add_argument("--study", action="store_true", help="the study of single settings instead of the variants")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe key, for every cell")
    parser.add_argument(
        "--pretrain-set", action="append", default=[], metavar="KEY=VALUE", help="the same for the pre-trainings"
    )
    parser.add_argument("--report", action="store_true", help="only the report")
    parsed = parser.parse_args()
    work = parsed.work.resolve()
    places = Places(parsed.shards.resolve(), work, (parsed.results or work / "results").resolve())
    try:
        if not parsed.report:
            run_missing(parsed, places)
        ablation_report.report(places.results)
    except VillaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
