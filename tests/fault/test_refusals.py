"""What is wrong is said in one line before anything is overwritten: exit code 2 for input, 3 for damage."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dist.ranks import REPOSITORY, start_ranks
from tests.runs import MODEL, STEPS, assert_same_run, make_data, metrics_rows, tiny_recipe, write_recipe
from tests.shards import make_shards
from villa_ds.cli import main
from villa_ds.data.manifest import fingerprint_of

pytestmark = pytest.mark.fault
CHANGING = ("log.txt", "lock", "rank-00000.json")  # who is here, and what was said


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", str(write_recipe(run.parent / "recipe.yaml", tiny_recipe(root, run)))]) == 0
    return run


@pytest.fixture
def data(root: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(root, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a run that was stopped after its last checkpoint, before its last validation."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    return tmp_path / "run"


def recipe_file(data: Path, run: Path, **changes: Any) -> str:
    return str(write_recipe(run.parent / "recipe.yaml", tiny_recipe(data, run, **changes)))


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that a refused start leaves alone."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in CHANGING)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refusal(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The message of a refused command: the last line of stderr, and the only one of its kind."""
    capsys.readouterr()
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    *log, line = captured.err.splitlines()
    assert line.startswith("villa-ds: ")
    assert not any(other.startswith("villa-ds: ") for other in log)
    return line.removeprefix("villa-ds: ")


def refused_at_once(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """A refusal that prints nothing else."""
    capsys.readouterr()
    assert main(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("villa-ds: ")


# Data


@pytest.mark.parametrize("missing", ["", "train", "train/manifest.json", "held-out"])
def test_data_that_is_not_there(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str) -> None:
    recipe = recipe_file(data, tmp_path / "run")
    target = data / missing
    target.unlink() if target.is_file() else shutil.rmtree(target)
    named = data / ("held-out" if missing == "held-out" else "train") / "manifest.json"
    message = refused_at_once(capsys, 2, "train", recipe)
    assert message == f"{named}: no manifest; is data.root right, was `villa-ds shards` run?"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_cut_in_half(
    root: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    """Training stops at the step that needs it; the mended shard lets the run go on as if nothing had been."""
    shard = data / "train" / "shard-000001.tar"
    size = shard.stat().st_size
    os.truncate(shard, size // 2)
    recipe = recipe_file(data, tmp_path / "run")
    message = refusal(capsys, 3, "train", recipe, f"data.workers={workers}")
    assert re.match(
        r"data set demo: \d+ of \d+ pairs cannot be read, more than data.damage_budget 0.001 allows: ", message
    )
    assert f"{shard}: has {size // 2} bytes, the manifest says {size}" in message
    assert main(["train", recipe, f"data.root={root}"]) == 0
    assert [row["step"] for row in metrics_rows(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_a_shard_that_is_gone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = data / "train" / "shard-000002.tar"
    shard.unlink()
    message = refusal(capsys, 3, "train", recipe_file(data, tmp_path / "run"))
    assert "pairs cannot be read, more than data.damage_budget 0.001 allows: " in message
    assert f"{shard}: cannot be opened: No such file or directory" in message


def test_features_of_another_width_than_the_manifest_says(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "held-out"):
        path = data / name / "manifest.json"
        content = json.loads(path.read_text()) | {"feature_width": 12}
        path.write_text(json.dumps(content | {"fingerprint": fingerprint_of(content)}))
    message = refusal(capsys, 2, "train", recipe_file(data, tmp_path / "run"))
    assert " has features of width 16, but the set is 12 wide; shards of another set were copied in" in message
    assert message.startswith(f"{data / 'train'}/shard-00000")


def test_sets_of_different_widths(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(data / "held-out")
    make_shards(data / "held-out", groups=5, shards=1, width=12)
    message = refused_at_once(capsys, 2, "train", recipe_file(data, tmp_path / "run"))
    assert message.startswith(f"{data / 'held-out'}: feature_width 12 differs from 16 of {data / 'train'}")
    assert not (tmp_path / "run").exists()


def test_texts_longer_than_the_position_table(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training texts, or held-out ones, which are not bounded by data.max_text_length: said before step 1."""
    recipe, run = recipe_file(data, tmp_path / "run"), tmp_path / "run"
    message = refused_at_once(capsys, 2, "train", recipe, "model.max_position_embeddings=10")
    assert message == (
        f"model.max_position_embeddings: 10 is too small for a text of 14 tokens in {data / 'train'}; "
        "raise it, or lower data.max_text_length"
    )
    message = refused_at_once(capsys, 2, "train", recipe, "model.max_position_embeddings=10", "data.max_text_length=8")
    assert message.endswith(f"a text of 14 tokens in {data / 'held-out'}; raise it")
    assert not run.exists()
    assert main(["train", recipe, "model.max_position_embeddings=14"]) == 0


def test_a_held_out_pair_beyond_the_token_budget_is_refused_before_the_first_step(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(data / "held-out")
    make_shards(data / "held-out", groups=5, shards=1, regions=(300, 301))
    message = refusal(capsys, 2, "train", recipe_file(data, tmp_path / "run"))
    assert message.startswith("data.tokens: 128 does not do: pair ")
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or metrics_rows(tmp_path / "run") == []


# Run directories and checkpoints


def test_another_recipe_in_the_same_directory(root: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    changed = ["seed=11", "optimizer.learning_rate=0.02"]
    message = refused_at_once(capsys, 2, "train", recipe_file(root, run), *changed)
    assert message == (
        f"{run} holds the run of another recipe (optimizer.learning_rate: 0.01 -> 0.02; seed: 10 -> 11): "
        "give another `output`, or name what may change with --allow-change KEY"
    )
    assert contents(run) == before


def test_a_folder_of_something_else(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "home"
    run.mkdir()
    (run / "thesis.tex").write_text("mine")
    message = refused_at_once(capsys, 2, "train", recipe_file(root, run))
    assert message == f"{run}: not empty and no run of ours; give another `output`"
    assert contents(run) == {"thesis.tex": b"mine"}


OTHER_MODEL = ["--allow-change", "model"]


def test_a_checkpoint_of_another_model(root: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = contents(run / "checkpoints")
    metrics = (run / "metrics.jsonl").read_bytes()
    recipe = recipe_file(root, run, model=MODEL | {"hidden_size": 32})
    message = refusal(capsys, 2, "train", recipe, *OTHER_MODEL)
    assert "is [16] in the checkpoint and [32] in this model" in message
    assert contents(run / "checkpoints") == checkpoints
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_refused_change_leaves_the_recipe_of_the_run(
    root: Path, run: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    recipe = recipe_file(root, run, model=MODEL | {"hidden_size": 32})
    refusal(capsys, 2, "train", recipe, *OTHER_MODEL)
    assert contents(run) == before
    assert main(["train", recipe_file(root, run)]) == 0  # goes on with the recipe that the run has
    assert_same_run(run, finished)


def test_all_checkpoints_damaged_starts_over_and_says_so(
    root: Path, run: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = sorted((run / "checkpoints").glob("step-*"))
    for folder in folders:
        (state,) = folder.rglob("state-*.safetensors")
        os.truncate(state, 100)
    capsys.readouterr()
    assert main(["train", recipe_file(root, run)]) == 0
    lines = capsys.readouterr().err.splitlines()
    for folder in folders:
        assert any(line.startswith(f"checkpoint {folder} is damaged and skipped: ") for line in lines)
    assert_same_run(run, finished)


# Engines


def test_a_batch_key_in_a_ds_config(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 1}}))
    engine = {"name": "deepspeed", "ds_config": str(config), "device": "cpu"}
    message = refused_at_once(capsys, 2, "train", recipe_file(root, tmp_path / "run", engine=engine))
    assert message.startswith(f"{config}: train_batch_size: take it out, the recipe's data.tokens and data.lanes ")
    assert not (tmp_path / "run").exists()


BAD_ENGINES = {
    "a ds_config that is a list": ({"name": "deepspeed", "ds_config": "list.json"}, "list.json: "),
    "a stage that does not exist": ({"name": "deepspeed", "ds_config": "stage7.json"}, "stage7.json: "),
    "no group under zero_optimization": ({"name": "deepspeed", "ds_config": "number.json"}, "number.json: "),
    "float16 on a CPU": ({"name": "deepspeed", "precision": "float16"}, "engine.precision: float16 needs a GPU"),
    "compiled layers at stage 3": (
        {"name": "deepspeed", "ds_config": "zero3", "compile": True},
        "engine.compile: layers cannot be compiled at ZeRO stage 3",
    ),
    "a device without values": ({"device": "meta"}, "engine.device: 'meta'"),
    "an unknown device": ({"device": "quantum"}, "engine.device: 'quantum'"),
    "a device that this machine lacks": ({"device": "cuda:99"}, "engine.device: 'cuda:99'"),
}


@pytest.mark.parametrize("case", BAD_ENGINES)
def test_an_engine_that_cannot_be(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "number.json").write_text('{"zero_optimization": 2}')
    (tmp_path / "stage7.json").write_text('{"zero_optimization": {"stage": 7}}')
    monkeypatch.chdir(tmp_path)
    engine, beginning = BAD_ENGINES[case]
    message = refusal(capsys, 2, "train", recipe_file(root, tmp_path / "run", engine={"device": "cpu"} | engine))
    assert message.startswith(beginning)


@pytest.fixture
def two_ranks(root: Path, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks of a recipe with three lanes."""
    recipe = tiny_recipe(root, tmp_path / "run", engine={"name": "deepspeed", "device": "cpu", "threads": 1})
    recipe["data"]["lanes"] = 3
    processes = start_ranks(2, "-m", "villa_ds", "train", str(write_recipe(tmp_path / "recipe.yaml", recipe)))
    yield processes
    for process in processes:
        process.kill()


def test_a_world_size_that_does_not_divide_the_lanes(two_ranks: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    """As users start it: every rank says it and leaves, none waits for another."""
    for process in two_ranks:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "Traceback" not in stderr
        (line,) = [line for line in stderr.splitlines() if line.startswith("villa-ds: ")]
        assert line == (
            "villa-ds: data.lanes: 3 micro-batches of a step cannot be shared evenly by 2 ranks; "
            "start 1, 3 ranks, or change data.lanes (which changes what a step computes)"
        )
    assert not (tmp_path / "run").exists()


def test_from_a_shell(root: Path, data: Path, tmp_path: Path) -> None:
    """One refusal as a user sees it, with nothing of this process around it."""
    os.truncate(data / "train" / "shard-000000.tar", 1000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-m", "villa_ds", "train", recipe_file(data, tmp_path / "run"), "data.workers=1"],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 3
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("villa-ds: data set demo: ")
    assert f" allows: {data}/train/shard-000000.tar: has 1000 bytes, the manifest says " in last
