"""The guarantees of the loaders (DESIGN section 4), on real shards with stand-in objectives."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.preparers import Plain
from tests.shards import make_shards
from villa_ds.config import DataConfig
from villa_ds.data.digest import digest
from villa_ds.data.lanes import BatchPlan, draw_task
from villa_ds.data.loader import EVALUATION_NAME, EVALUATION_SEED, EvaluationLoader, Loader, StepBatches
from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.errors import CheckpointError, ConfigError, DamageError, DataError
from villa_ds.rng import Stream

Sets = dict[str, Manifest]
TASKS = [("large", Plain("plain"), 1.0), ("large", Plain("match", 0.5), 2.0), ("tiny", Plain("plain"), 1.0)]
LANES = 12


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    """A set of odd size and shard count, and one that is smaller than a step."""
    folder = tmp_path_factory.mktemp("sets")
    return {
        "large": make_shards(folder / "large", groups=35, texts_per_group=3, shards=5),
        "tiny": make_shards(folder / "tiny", groups=3, texts_per_group=2, shards=3, seed=1),
    }


def make_loader(sets: Sets, *, world: int = 1, rank: int = 0, steps: int = 8, **changes: Any) -> Loader:
    position, tasks, lanes = changes.pop("position", None), changes.pop("tasks", TASKS), changes.pop("lanes", LANES)
    values = {"tokens": 150, "rows_multiple": 2, "window": 30, "max_text_length": 11, "workers": 0, **changes}
    config = DataConfig(lanes=lanes, **values)
    return Loader(sets, tasks, config, 7, BatchPlan(lanes, world), rank, steps, position)


Seen = tuple[int, str, str, list[tuple[Any, ...]]]


def seen(step: StepBatches) -> Seen:
    """All that a step delivers to one rank, in order."""
    return step.step, step.data, step.objective, [(batch.ids, digest(batch)) for batch in step.batches]


def run(loaders: Iterable[Loader]) -> list[Seen]:
    """The global sequence of the loaders of all ranks; lanes of a step one after the other."""
    steps = []
    for ranks in zip(*loaders, strict=True):
        parts = [seen(step) for step in ranks]
        assert len({part[:3] for part in parts}) == 1
        plans = {tuple((micro.epoch, micro.index, micro.ids) for micro in step.micro_batches) for step in ranks}
        assert len(plans) == 1
        assert [micro.ids for micro in ranks[0].micro_batches] == [item[0] for part in parts for item in part[3]]
        steps.append((*parts[0][:3], [item for part in parts for item in part[3]]))
    return steps


@pytest.fixture(scope="module")
def reference(sets: Sets) -> list[Seen]:
    return run([make_loader(sets)])


@pytest.mark.parametrize("world", [2, 3, 4, 6, 12])
def test_every_world_size_delivers_the_same_global_sequence(sets: Sets, reference: list[Seen], world: int) -> None:
    loaders = [make_loader(sets, world=world, rank=rank) for rank in range(world)]
    assert run(loaders) == reference
    assert {json.dumps(loader.state()) for loader in loaders} == {json.dumps(make_loader_state(sets))}


def make_loader_state(sets: Sets) -> dict[str, Any]:
    loader = make_loader(sets)
    list(loader)
    return loader.state()


@pytest.mark.parametrize(("workers", "world"), [(1, 1), (2, 2), (4, 1)])
def test_loader_processes_change_nothing(sets: Sets, reference: list[Seen], workers: int, world: int) -> None:
    random_state = torch.random.get_rng_state()
    loaders = [make_loader(sets, world=world, rank=rank, workers=workers, prefetch=3) for rank in range(world)]
    assert run(loaders) == reference
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_a_step_may_hold_more_tensors_than_the_usual_limit_of_open_files(sets: Sets) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        steps = [seen(step) for step in make_loader(sets, workers=1, lanes=48, steps=2)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert steps == [seen(step) for step in make_loader(sets, lanes=48, steps=2)]


def test_every_pair_comes_once_an_epoch_whatever_objectives_are_drawn(sets: Sets) -> None:
    epochs: dict[tuple[str, int], Counter[str]] = {}
    order: dict[str, list[tuple[int, int]]] = {"large": [], "tiny": []}
    objectives = set()
    for step in make_loader(sets, lanes=4, steps=60):
        objectives.add((step.data, step.objective))
        assert step.task == draw_task(7, step.step, [1.0, 2.0, 1.0])
        assert len(step.batches) == 4
        for batch, micro in zip(step.batches, step.micro_batches, strict=True):
            assert batch.ids == micro.ids
            epochs.setdefault((step.data, micro.epoch), Counter()).update(batch.ids)
            order[step.data].append((micro.epoch, micro.index))
    assert objectives == {("large", "plain"), ("large", "match"), ("tiny", "plain")}
    for name, places in order.items():
        index = sets[name].index
        expected = Counter(item.decode() for item in index["pair_id"][index["pair_length"] <= 11].tolist())
        last = places[-1][0]
        assert last >= 2
        assert all(epochs[name, epoch] == expected for epoch in range(last))
        assert epochs[name, last] <= expected
        assert places == sorted(set(places))


@given(st.integers(0, 7), st.integers(0, 7), st.sampled_from([(1, 1), (2, 4), (12, 3)]))
@settings(max_examples=15, deadline=None)
def test_a_resume_goes_on_exactly_and_so_does_a_second(
    sets: Sets, reference: list[Seen], first: int, second: int, worlds: tuple[int, int]
) -> None:
    """Stop after `first` steps, go on with another world size, stop `second` steps later, go on again."""
    got: list[Seen] = []
    position = None
    for stop, world in [(first, worlds[0]), (second, worlds[1]), (8, worlds[0])]:
        loaders = [make_loader(sets, world=world, rank=rank, position=position) for rank in range(world)]
        got += run([islice(loader, stop) for loader in loaders])  # type: ignore[misc]
        states = [json.dumps(loader.state()) for loader in loaders]
        assert len(set(states)) == 1
        position = json.loads(states[0])
    assert got == reference
    assert position["step"] == 8


def test_the_state_is_of_what_was_delivered_not_of_what_was_loaded_ahead(sets: Sets) -> None:
    ahead, plain = make_loader(sets, workers=2, prefetch=8), make_loader(sets)
    assert ahead.state() == {"step": 0, "sets": {"large": [0, 0], "tiny": [0, 0]}}
    for ours, theirs in zip(islice(ahead, 3), islice(plain, 3), strict=True):
        assert seen(ours) == seen(theirs)
        assert ahead.state() == plain.state()
    ahead.close()


def test_iterating_again_goes_on(sets: Sets, reference: list[Seen]) -> None:
    loader = make_loader(sets)
    got = [seen(step) for step in islice(loader, 3)] + [seen(step) for step in islice(loader, 2)]
    assert [*got, *map(seen, loader)] == reference
    assert list(loader) == []


def test_a_resume_at_an_epochs_first_pair(sets: Sets) -> None:
    """One lane, so that some step ends exactly where an epoch does."""
    whole = [seen(step) for step in make_loader(sets, lanes=1, steps=60)]
    loader = make_loader(sets, lanes=1, steps=60)
    boundaries = 0
    for step in loader:
        state = loader.state()
        if state["sets"][step.data][1] == 0:
            boundaries += 1
            resumed = make_loader(sets, lanes=1, steps=step.step + 4, position=json.loads(json.dumps(state)))
            assert [seen(after) for after in resumed] == whole[step.step : step.step + 4]
    assert boundaries >= 2


def test_each_pair_draws_from_its_own_stream_and_negatives_reach_their_objective(sets: Sets) -> None:
    index = sets["large"].index
    number = {identifier.decode(): pair for pair, identifier in enumerate(index["pair_id"].tolist())}
    matched = Counter[bool]()
    for step in make_loader(sets, lanes=4, steps=30, tasks=TASKS[:2]):
        for batch, micro in zip(step.batches, step.micro_batches, strict=True):
            for row, identifier in enumerate(batch.ids):
                stream = Stream(7, "large", "prepare", step.objective, micro.epoch, number[identifier])
                assert int(batch.targets["word"][row]) == int(stream.words(1)[0] >> np.uint64(1))
            groups = np.where(micro.negatives >= 0, micro.negatives, index["pair_group"][micro.pairs])
            if step.objective == "plain":
                assert batch.targets["matched"].all()
                groups = index["pair_group"][micro.pairs]
            else:
                assert batch.targets["matched"].tolist() == (micro.negatives < 0).tolist()
                matched.update(batch.targets["matched"].tolist())
            assert batch.region_counts.tolist() == index["group_regions"][groups].tolist()
    assert 0.4 < matched[False] / matched.total() < 0.6


def test_real_batches_keep_the_token_budget(sets: Sets) -> None:
    for step in make_loader(sets, lanes=4, steps=30):
        for batch in step.batches:
            assert len(batch) * batch.joint_length <= 150


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_raised_as_itself(sets: Sets, tmp_path: Path, workers: int) -> None:
    folder = shutil.copytree(sets["large"].folder, tmp_path / "large")
    for path in folder.glob("*.tar"):
        path.write_bytes(path.read_bytes()[:-1024])
    damaged = {**sets, "large": load_manifest(folder)}
    with pytest.raises(DamageError, match=r"^[^\n]*shard-00000\d\.tar: has \d+ bytes[^\n]*$"):
        list(make_loader(damaged, workers=workers, tasks=TASKS[:1]))


def test_what_does_not_fit_is_refused(sets: Sets) -> None:
    with pytest.raises(CheckpointError, match=r"\['large', 'other'\], but the tasks use \['large', 'tiny'\]"):
        make_loader(sets, position={"step": 3, "sets": {"large": [0, 1], "other": [0, 0]}})
    for place in ([0, 10_000], [0, -1], [-1, 0], [10**30, 0], [0], [0, 0, 0]):
        with pytest.raises(
            CheckpointError, match=r"saved position \(epoch, micro-batch\) .* of the data set large is not"
        ):
            make_loader(sets, position={"step": 3, "sets": {"large": place, "tiny": [0, 0]}})
    with pytest.raises(ConfigError, match=r"data\.tokens: 20 does not do"):
        make_loader(sets, tokens=20)


def test_the_loader_says_what_the_plan_makes_of_each_set(sets: Sets) -> None:
    large, tiny = make_loader(sets).describe()
    left_out = int((sets["large"].index["pair_length"] > 11).sum())
    assert left_out > 0
    assert large.startswith(f"data set large: {sets['large'].num_pairs - left_out} pairs an epoch ({left_out} left out")
    assert "read amplification" in tiny


SIGNALLED = """
import os, signal, sys
from pathlib import Path
from tests.preparers import Failing
from tests.unit.test_loader import make_loader
from villa_ds.data.manifest import load_manifest
root, how, marker = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
sets = {name: load_manifest(root / name) for name in ("large", "tiny")}
steps = iter(make_loader(sets, steps=400, workers=2, tasks=[("large", Failing("failing", marker=marker), 1.0)]))
next(steps)

def below(process):
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [*children, *(one for child in children for one in below(child))]

others = below(os.getpid())  # loader processes, what they are forked from, what keeps account of shared things
notices = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
pid = os.fork()  # a process that is not the trainer
if pid == 0:
    for other in others:
        for number in notices:
            os.kill(int(other), number)
    os._exit(0)
os.waitpid(pid, 0)
for _ in range(30):
    step = next(steps)
print(len(others), step.step, flush=True)
if how == "crash":
    Path(marker).touch()
    list(steps)
sys.exit(75)  # with the loader processes still running
"""


def below(process: int) -> list[int]:
    """Children, and theirs."""
    children = list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))
    return [*children, *(one for child in children for one in below(child))]


def status(process: int) -> dict[str, str]:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_loader_processes_are_forked_by_a_process_without_threads(sets: Sets) -> None:
    """One forked by a process with threads hung now and then, on a lock that gloo's held at the time."""
    before = below(os.getpid())
    loader = make_loader(sets, workers=2)
    next(iter(loader))
    started = [process for process in below(os.getpid()) if process not in before]
    servers = {int(status(process)["PPid"]) for process in started if status(process)["Threads"] != "1"}
    assert len(servers) == 1
    assert os.getpid() not in servers
    assert status(servers.pop())["Threads"] == "1"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_killed_loader_process_is_one_line(sets: Sets) -> None:
    before = below(os.getpid())
    steps = iter(make_loader(sets, workers=1, steps=400))
    next(steps)
    for process in below(os.getpid()):
        if process not in before and status(process)["Threads"] != "1":  # not what it was forked from
            os.kill(process, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a loader process was killed, perhaps for memory; give fewer data\.workers"):
        list(steps)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.test_loader import below, make_loader
from villa_ds.data.manifest import load_manifest
root = Path(sys.argv[1])
steps = iter(make_loader({name: load_manifest(root / name) for name in ("large", "tiny")}, steps=400, workers=2))
next(steps)
print(*below(os.getpid()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_nothing_outlives_a_killed_trainer(sets: Sets, tmp_path: Path) -> None:
    with (tmp_path / "pids").open("w") as output:  # not a pipe, whose end would wait for those that live on
        command = [sys.executable, "-c", KILLED, str(sets["large"].folder.parent)]
        environment = {**os.environ, "PYTHONPATH": "."}
        done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, stdout=output, check=False)
    others = (tmp_path / "pids").read_text().split()
    assert (done.returncode, len(others)) == (-signal.SIGKILL, 4)
    deadline = time.monotonic() + 20
    while alive := [other for other in others if Path(f"/proc/{other}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="tells who sent a signal by sigwaitinfo, as on Linux")
@pytest.mark.parametrize(("how", "status", "error"), [("exit", 75, ""), ("crash", 1, "ZeroDivisionError")])
def test_loader_processes_outlive_a_schedulers_notice_and_end_with_the_trainer(
    sets: Sets, tmp_path: Path, how: str, status: int, error: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(sets["large"].folder.parent), how, str(tmp_path / "crash")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=60,  # it would wait for its loader processes for ever
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (status, ["4", "31"]), done.stderr
    assert error in done.stderr


def evaluate(manifest: Manifest, objective: Plain, world: int, limit: int | None = None, **changes: Any) -> list[Any]:
    """Per rank, the list of (ids, digest, whether it counts)."""
    values = {"tokens": 150, "rows_multiple": 8, "window": 30, "max_text_length": 5, "workers": 0, **changes}
    ranks = []
    for rank in range(world):
        loader = EvaluationLoader(
            manifest, objective, DataConfig(lanes=12, **values), BatchPlan(12, world), rank, limit
        )
        ranks.append([(batch.ids, digest(batch), counts) for batch, counts in loader])
        assert len(ranks[-1]) == len(loader)
    return ranks


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_sees_every_pair_once_and_ranks_stay_in_step(sets: Sets, world: int) -> None:
    single = evaluate(sets["large"], Plain("match", 0.5), 1)[0]
    ranks = evaluate(sets["large"], Plain("match", 0.5), world)
    assert len({len(rank) for rank in ranks}) == 1
    turns = [batch for turn in zip(*ranks, strict=True) for batch in turn]
    assert [batch for batch in turns if batch[2]] == single
    identifiers = [identifier for ids, _, _ in single for identifier in ids]
    assert sorted(identifiers) == sorted(item.decode() for item in sets["large"].index["pair_id"].tolist())
    assert all(not counts for _, _, counts in turns[len(single) :])


def test_evaluation_is_the_same_each_time_and_with_loader_processes(sets: Sets) -> None:
    first = evaluate(sets["large"], Plain("match", 0.5), 2)
    assert evaluate(sets["large"], Plain("match", 0.5), 2, workers=2) == first
    limited = evaluate(sets["large"], Plain("match", 0.5), 2, limit=3)
    assert limited[0] == first[0][:2]
    assert limited[1][0] == first[1][0]
    assert [counts for _, _, counts in limited[1]] == [True, False]


def test_evaluation_draws_from_its_own_seed(sets: Sets) -> None:
    loader = EvaluationLoader(sets["tiny"], Plain("plain"), DataConfig(workers=0), BatchPlan(4, 1), 0)
    ((batch, counts),) = loader
    assert counts
    for row, identifier in enumerate(batch.ids):
        pair = sets["tiny"].index["pair_id"].tolist().index(identifier.encode())
        stream = Stream(EVALUATION_SEED, EVALUATION_NAME, "prepare", "plain", 0, pair)
        assert int(batch.targets["word"][row]) == int(stream.words(1)[0] >> np.uint64(1))
