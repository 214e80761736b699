"""Trials: spoil something by a seed, use it, and judge what comes of it.

`VILLA_DS_FUZZ_KINDS` (such as "checkpoints,weights") keeps to some kinds of things.

`python -m tests.fuzz.trials FIRST COUNT [FOLDER]` prints a JSON line per finding, then one with what came how often. A
trial ends well if what is read is valid, or if one of our own errors says why it is not. Everything else is a finding:
another exception, more than `SECONDS`, more than `MEMORY` (as a MemoryError), a class that pickle looks up, a process
that is started, a file that is opened outside the trial's folder.
"""

import contextlib
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.downstream import make_task_shards
from tests.fuzz.mutations import MARKER, Files, read, spoil_lines, spoil_recipe, spoil_set, write
from tests.fuzz.states import Checkpoints, Conversions, Weights
from tests.runs import tiny_recipe
from tests.shards import make_shards
from villa_ds.batch import Sample
from villa_ds.config import DataConfig, StabilityConfig, load_recipe
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.loader import EvaluationLoader, Loader
from villa_ds.data.manifest import FURTHER_DTYPES, Manifest, load_manifest
from villa_ds.data.order import require_order
from villa_ds.data.reader import ShardReader
from villa_ds.data.statistics import stat
from villa_ds.data.verify import verify, verify_sample
from villa_ds.errors import VillaError
from villa_ds.objectives.base import build_objective
from villa_ds.train.metrics import cut_metrics
from villa_ds.train.stability import Guard

SECONDS = 20.0  # for one trial; the usual one takes some milliseconds, and the machine may be busy
MEMORY = 1 << 30  # bytes beyond what the process holds when the trials begin
READABLE = tuple(
    str(Path(place).resolve())
    for place in (
        sys.prefix,
        sys.base_prefix,
        Path(__file__).parents[2],
        "/proc",
        "/sys",
        "/dev",
        "/usr",
        "/etc/localtime",
    )
)
FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")


class TooLongError(BaseException):
    """A trial that does not end; no handler of ours may swallow it."""


class Watch:
    """Audits what a trial does; hooks cannot be taken out again, so one serves them all."""

    def __init__(self, scratch: Path, folder: Path) -> None:
        """Trials may write below `folder`, and read below `scratch`."""
        self.folder, self.active = str(folder.resolve()), False
        self.readable = (*READABLE, str(scratch.resolve()))
        self.seen: list[str] = []
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            writes = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if not path.startswith(self.folder) and (writes or not path.startswith(self.readable)):
                self.seen.append(f"open {path} {'to write' if writes else 'to read'}")

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        self.seen.clear()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        self.active = True
        try:
            yield
        finally:
            self.active = False
            signal.setitimer(signal.ITIMER_REAL, 0)


# What is done with a shard set


def check_sample(sample: Sample, manifest: Manifest, pair: int) -> None:
    """AssertionError unless everything that a consumer relies on holds."""
    index = manifest.index
    group = index["pair_group"][pair]
    assert sample.id.encode() == index["pair_id"][pair]
    assert len(sample.word_pieces) == index["pair_length"][pair] > 0
    assert sample.word_pieces.dtype == np.int32
    assert 0 <= sample.word_pieces.min() <= sample.word_pieces.max() < manifest.vocabulary.size
    assert isinstance(sample.target, dict)
    assert len(sample.regions) == index["group_regions"][group] > 0
    for regions in (sample.regions, sample.negative or sample.regions):
        assert regions.features.shape == (len(regions), manifest.feature_width)
        assert regions.features.dtype == np.float16
        assert regions.boxes.shape == (len(regions), 7)
        assert regions.boxes.dtype == np.float32
        assert np.isfinite(regions.features).all()
        assert np.isfinite(regions.boxes).all()
        spans = [(span.start, span.stop) for span in regions.images]
        assert [*itertools.chain.from_iterable(spans)][1:-1] == [edge for _, edge in spans[:-1] for _ in (0, 1)]
        assert (spans[0][0], spans[-1][1]) == (0, len(regions))
        if manifest.label_format != "none":
            assert regions.labels is not None
            assert regions.labels.shape == (len(regions), manifest.detector_classes)
            assert np.isfinite(regions.labels).all()


def read_pairs(folder: Path, rng: random.Random) -> str:
    manifest = load_manifest(folder)
    require_order(manifest)
    reader, damaged = ShardReader(manifest), 0
    for pair in range(manifest.num_pairs):
        try:
            sample = reader.sample(pair, rng.choice((-1, rng.randrange(manifest.num_groups))))
        except VillaError as error:
            judge_message(error)
            damaged += 1
        else:
            check_sample(sample, manifest, pair)
    return "sound" if damaged == 0 else "all damaged" if damaged == manifest.num_pairs else "partly damaged"


def load_batches(folder: Path, _: random.Random) -> str:
    manifest = load_manifest(folder)
    lengths = manifest.index_files.keys() & FURTHER_DTYPES.keys()
    names = ("vcr",) if "pair_answer" in lengths else ("mlm", "nlvr2") if lengths else ("mlm", "itm", "vqa")
    objectives = [build_objective(name, ObjectivesConfig(), manifest) for name in names]
    data = DataConfig(tokens=480 if lengths else 160, rows_multiple=2, lanes=2, window=8, max_text_length=13, workers=0)
    tasks = [("set", objective, 1.0) for objective in objectives]
    met = 0
    for step in Loader({"set": manifest}, tasks, data, 3, BatchPlan(2), 0, 6):
        for batch in step.batches:
            assert len(batch.ids) > 0
            assert len(batch) * batch.joint_length <= data.tokens
            assert batch.features.isfinite().all()
        met += len(step.damage)
    if not met:
        for batch, _ in EvaluationLoader(manifest, objectives[1], data, BatchPlan(2), 0):
            assert batch.features.isfinite().all()
    return "partly damaged" if met else "sound"


def verify_all(folder: Path, _: random.Random) -> str:
    return "problems found" if verify(folder).problems else "sound"


def verify_some(folder: Path, _: random.Random) -> str:
    return "problems found" if verify_sample(folder, 3).problems else "sound"


def describe(folder: Path, _: random.Random) -> str:
    str(stat(folder))
    return "sound"


USES = (*3 * [read_pairs], *2 * [load_batches], verify_all, verify_some, describe)


def judge_message(error: VillaError) -> None:
    text = str(error)
    assert text, "an error without words"
    assert len(text) < 4000, f"{len(text)} characters: {text[:200]}"


# The trials


class Trials:
    """Sound sets, recipes and journals, and what is done with spoilt copies of them."""

    def __init__(self, folder: Path) -> None:
        self.sets: list[Files] = []
        for number, form in enumerate(("dense", "topk", "none")):
            place = folder / f"sound-{form}"
            classes = 0 if form == "none" else 4
            make_shards(
                place, groups=5, texts_per_group=2, shards=2, width=4, classes=classes, seed=number,
                images_per_group=1 + number % 2, label_format=form, regions=(2, 5),
            )  # fmt: skip
            self.sets.append(read(place))
        for layout in ("vcr", "nlvr2"):
            make_task_shards(folder / layout, layout, groups=5)
            self.sets.append(read(folder / layout))
        self.checkpoints, self.weights, self.conversions = Checkpoints(folder), Weights(folder), Conversions(folder)
        self.recipe = yaml.safe_dump(tiny_recipe(folder, folder / "run")).encode()
        event = {"phase": "a", "objective": "mlm", "kind": "spike", "loss": 1.0, "action": "skip"}
        self.events = b"".join(json.dumps({"step": step, **event}).encode() + b"\n" for step in (2, 5, 9))
        row = {"phase": "a", "losses": {"loss": 1.5}, "grad_norm": None}
        self.metrics = b"".join(json.dumps({"step": step, **row}).encode() + b"\n" for step in range(1, 8))
        self.place = folder / "spoilt"
        self.watch = Watch(folder, self.place)

    def _read_events(self) -> str:
        Guard(StabilityConfig(), self.place, 0).left_out(5)
        return "sound"

    def run(self, seed: int) -> tuple[str, str | None]:
        """(what was tried and came of it, what is wrong with that)."""
        rng = random.Random(seed)  # noqa: S311 (a repeatable choice)
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        kinds = {"set": 14, "recipe": 1, "events": 1, "metrics": 1, "checkpoints": 2, "weights": 1, "conversions": 1}
        chosen = [name for name in kinds if name in os.environ.get("VILLA_DS_FUZZ_KINDS", ",".join(kinds)).split(",")]
        kind = rng.choices(chosen, [kinds[name] for name in chosen])[0]
        if kind == "set":
            files = dict(rng.choice(self.sets))
            spoil_set(files, rng)
            write(files, self.place)
            use = rng.choice(USES)
            name, action = use.__name__, lambda: use(self.place, rng)
        elif kind == "recipe":
            (self.place / "recipe.yaml").write_bytes(spoil_recipe(self.recipe, rng))
            name, action = "load_recipe", lambda: load_recipe(self.place / "recipe.yaml") and "sound"
        elif kind == "events":
            (self.place / "stability.jsonl").write_bytes(spoil_lines(self.events, rng))
            name, action = "events", self._read_events
        elif kind in ("checkpoints", "weights", "conversions"):
            state = getattr(self, kind)
            name, action = kind, lambda: state.trial(rng)
        else:
            (self.place / "metrics.jsonl").write_bytes(spoil_lines(self.metrics, rng))
            name, action = "metrics", lambda: cut_metrics(self.place / "metrics.jsonl", 4) or "sound"
        outcome, finding = "", None
        try:
            with self.watch.trial(), contextlib.redirect_stderr(io.StringIO()):
                outcome = action()
        except VillaError as error:
            outcome = type(error).__name__
            try:
                judge_message(error)
            except AssertionError as bad:
                finding = str(bad)
        except TooLongError:
            finding = f"took more than {SECONDS} s"
        except Exception:  # noqa: BLE001 (what is looked for)
            finding = traceback.format_exc(limit=-6)
        if self.watch.seen:
            finding = f"{finding or ''} {self.watch.seen[:3]}"
        if Path(os.environ[MARKER]).exists():
            finding = f"{finding or ''} a pickle was loaded"
        return f"{name}: {outcome or 'finding'}", finding


def too_long(*_: object) -> None:
    raise TooLongError


def main(first: int, count: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    os.environ[MARKER] = str(folder / "marker")
    trials = Trials(folder)
    signal.signal(signal.SIGALRM, too_long)
    trials.run(first)  # imports and caches come before the limit
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    started, outcomes = time.monotonic(), Counter[str]()
    for seed in range(first, first + count):
        outcome, finding = trials.run(seed)
        outcomes[outcome] += 1
        if finding is not None:
            print(json.dumps({"seed": seed, "tried": outcome, "finding": finding}), flush=True)
        elif seed % 100 == 0:
            print("{}", flush=True)  # still there
    print(json.dumps({"outcomes": outcomes, "seconds": round(time.monotonic() - started, 1)}), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[3] if len(sys.argv) > 3 else None) as scratch:
        main(int(sys.argv[1]), int(sys.argv[2]), Path(scratch))
