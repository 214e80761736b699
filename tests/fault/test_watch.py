"""A rank that dies, hangs or fails alone is named with its last step and stage, and no rank waits for ever."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.fault.jobs import TRIALS, ZERO, finish, job, recipe_file, run_to_end, wait_until
from tests.runs import assert_same_run, make_data, metrics_rows
from villa_ds.errors import EXIT_RANK_LOST

pytestmark = pytest.mark.fault
TIMEOUT_S = 6.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def note(run: Path, rank: int) -> dict[str, object]:
    content: dict[str, object] = json.loads((run / "heartbeats" / f"rank-{rank:05d}.json").read_text())
    return content


ALL = [
    # sabotage, exit codes of ranks 0 and 1 (None: it stays frozen), what is told
    pytest.param("die=1:6", (EXIT_RANK_LOST, -9), "rank 1 died or is frozen: no sign of life for 3 s", id="1 dies"),
    pytest.param("hang=1:6", (EXIT_RANK_LOST, EXIT_RANK_LOST), "rank 1 has not moved for 6 s", id="1 hangs"),
    pytest.param("freeze=0:6", (None, EXIT_RANK_LOST), "rank 0 died or is frozen: no sign of life", id="0 freezes"),
    pytest.param("damage=0:6", (3, 3), "rank 0 ended (DamageError: shard-000007.tar: bytes are damaged)", id="0 ends"),
    pytest.param("bug=1:6", (1, 1), "rank 1 ended (ZeroDivisionError: a bug in rank-dependent code)", id="1 fails"),
    pytest.param("die=0:6", (-9, EXIT_RANK_LOST), "rank 0 died or is frozen: no sign of life for 3 s", id="0 dies"),
    pytest.param("freeze=1:6", (EXIT_RANK_LOST, None), "rank 1 died or is frozen: no sign of life", id="1 freezes"),
]


@pytest.mark.parametrize(("sabotage", "codes", "line"), ALL if TRIALS else ALL[:2])
def test_the_culprit_is_named(
    root: Path, tmp_path: Path, sabotage: str, codes: tuple[int | None, int | None], line: str
) -> None:
    run, culprit = tmp_path / "run", int(sabotage.split("=")[1][0])
    recipe = recipe_file(root, run, engine=ZERO, checkpoints={"every": 2}, watch={"timeout_s": TIMEOUT_S})
    with job(recipe, sabotage, world=2) as processes:
        results = [
            None if code is None else finish([process])[0] for process, code in zip(processes, codes, strict=True)
        ]
    for rank, result in enumerate(results):
        if result is not None:
            assert result[0] == codes[rank], result[1][-4000:]
    survivor = results[1 - culprit]
    assert survivor is not None
    (told,) = [text for text in survivor[1].splitlines() if line in text]
    assert "; last at step 6, forward and backward" in told
    assert "Traceback" not in survivor[1]
    if TRIALS:
        run_to_end(recipe, world=2)
        run_to_end(recipe_file(root, tmp_path / "reference", engine=ZERO), world=2)
        assert_same_run(run, tmp_path / "reference")


@pytest.mark.skipif(not TRIALS, reason="one of many: make test-fault")
def test_waiting_for_data(root: Path, tmp_path: Path) -> None:
    recipe = recipe_file(root, tmp_path / "run", engine=ZERO, watch={"timeout_s": TIMEOUT_S})
    with job(recipe, "hang_loading=0:4", world=2) as processes:
        results = finish(processes)
    for code, stderr in results:
        assert code == EXIT_RANK_LOST
        assert "rank 0 has not moved for" in stderr
        assert "at step 4, loading data; 1 further on wait" in stderr


def test_one_process_that_hangs(root: Path, tmp_path: Path) -> None:
    recipe = recipe_file(root, tmp_path / "run", watch={"timeout_s": 2.0})
    with job(recipe, "hang=0:4") as processes:
        ((code, stderr),) = finish(processes)
    assert code == EXIT_RANK_LOST
    assert "rank 0 has not moved for 2 s; last at step 4, forward and backward: every rank ends" in stderr
    assert "rank 0 has not moved" in (tmp_path / "run" / "log.txt").read_text()


def test_slow_is_not_hung(root: Path, tmp_path: Path) -> None:
    """Steps that together take far longer than the timeout, each of them shorter."""
    recipe = recipe_file(root, tmp_path / "run", steps=5, watch={"timeout_s": 1.5})
    run_to_end(recipe, "slow=0.8")
    assert sum(row["seconds"] for row in metrics_rows(tmp_path / "run")) > 2 * 1.5
    assert note(tmp_path / "run", 0)["ended"] == ["done", 0]


def test_a_job_that_is_suspended_and_continued_goes_on(root: Path, tmp_path: Path) -> None:
    """Ctrl-Z, a laptop's lid: the timeout passes, but nobody was there to watch it pass."""
    recipe = recipe_file(root, tmp_path / "run", steps=6, watch={"timeout_s": 2.0})
    with job(recipe, "slow=0.5") as processes:
        wait_until((tmp_path / "run" / "heartbeats" / "rank-00000.json").exists, processes)
        processes[0].send_signal(signal.SIGSTOP)
        time.sleep(3)
        processes[0].send_signal(signal.SIGCONT)
        ((code, stderr),) = finish(processes)
    assert code == 0, stderr
