"""The run directory belongs to one recipe; what it computes does not change unnoticed."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs import tiny_recipe
from villa_ds.config import Recipe
from villa_ds.errors import CheckpointError
from villa_ds.mapping import from_mapping, to_mapping
from villa_ds.train.rundir import differences, open_run_directory, write_recipe, write_results


def recipe_in(run: Path, **changes: Any) -> Recipe:
    """`changes` are dotted keys with ``__`` for the dots."""
    mapping = tiny_recipe(Path("data"), run)
    for key, value in changes.items():
        *parents, last = key.split("__")
        node: Any = mapping
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
        node[int(last) if isinstance(node, list) else last] = value
    return from_mapping(Recipe, mapping, "")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory in which a step was taken."""
    directory = begin(recipe_in(tmp_path / "run"))
    (directory / "metrics.jsonl").write_text('{"step": 1}\n')
    return directory


def begin(recipe: Recipe, *allowed: str) -> Path:
    """What a start that nothing refuses does."""
    directory = open_run_directory(recipe, rank=0, allow_change=allowed)
    write_recipe(directory, recipe)
    return directory


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_new_directory_gets_the_resolved_recipe_and_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_in(tmp_path / "deep" / "run")
    directory = begin(recipe)
    assert directory == tmp_path / "deep" / "run"
    assert sorted(content(directory)) == ["config.yaml", "log.txt"]
    assert from_mapping(Recipe, yaml.safe_load((directory / "config.yaml").read_text()), "") == recipe
    logging.getLogger("villa_ds").info("a line")
    assert capsys.readouterr().err == "a line\n"
    assert (directory / "log.txt").read_text().endswith(" INFO a line\n")


def test_other_ranks_write_nothing_and_only_warn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_run_directory(recipe_in(tmp_path / "run"), rank=1)
    logging.getLogger("villa_ds").info("a line")
    logging.getLogger("villa_ds").warning("a warning")
    assert capsys.readouterr().err == "a warning\n"
    assert not (tmp_path / "run").exists()


def test_the_same_recipe_goes_on_and_the_log_grows(run: Path) -> None:
    logging.getLogger("villa_ds").info("first")
    open_run_directory(recipe_in(run), rank=0)
    logging.getLogger("villa_ds").info("second")
    assert [line.split()[-1] for line in (run / "log.txt").read_text().splitlines()] == ["first", "second"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 4}, "seed: 10 -> 4"),
        ({"model__hidden_size": 32}, "model.hidden_size: 16 -> 32"),
        ({"data__lanes": 4}, "data.lanes: 2 -> 4"),
        ({"data__tokens": 256}, "data.tokens: 128 -> 256"),
        ({"data__sets": {"demo": "other"}}, "data.sets.demo: 'train' -> 'other'"),
        ({"optimizer__learning_rate": 0.02}, "optimizer.learning_rate: 0.01 -> 0.02"),
        ({"tasks__1__weight": 2.0}, "tasks.1.weight: 1.0 -> 2.0"),
        ({"phases__1__adversary__steps": 3}, "phases.1.adversary.steps: 2 -> 3"),
        ({"phases__0__steps": 8}, "phases.0.steps: 7 -> 8"),
        ({"initialize": "w.pt"}, "initialize: None -> 'w.pt'"),
        ({"objectives__itm": {"ot_weight": 0.0}}, "objectives.itm.ot_weight: 0.1 -> 0.0"),
    ],
)
def test_another_recipe_is_refused_with_the_dotted_difference(
    run: Path, change: dict[str, Any], difference: str
) -> None:
    before = content(run)
    with pytest.raises(CheckpointError) as caught:
        open_run_directory(recipe_in(run, **change), rank=0)
    assert str(caught.value) == (
        f"{run} holds the run of another recipe ({difference}): "
        "give another `output`, or name what may change with --allow-change KEY"
    )
    assert content(run) == before


def test_all_differences_are_shown_at_once(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\(data\.lanes: 2 -> 4; seed: 10 -> 4\)"):
        open_run_directory(recipe_in(run, seed=4, data__lanes=4), rank=0)


def test_another_number_of_phases_or_tasks_is_shown_whole(run: Path) -> None:
    recipe = recipe_in(run)
    with pytest.raises(CheckpointError, match=r"\(phases: \[.*\] -> \[.*\]\)"):
        open_run_directory(replace(recipe, phases=recipe.phases[:1]), rank=0)


@pytest.mark.parametrize(
    "change",
    [
        {"data__root": "moved"}, {"data__validation": {}}, {"data__workers": 3}, {"data__prefetch": 9},
        {"engine__name": "deepspeed"},
        {"validation": {"every": 2, "micro_batches": 1}}, {"checkpoints": {"every": 1, "keep_last": 9}},
        {"log__every": 1}, {"log_sample_ids": True}, {"model__fused_layer_norm": False},
        {"model__activation_checkpointing": True},
    ],
)  # fmt: skip
def test_where_and_how_it_runs_may_change(run: Path, change: dict[str, Any]) -> None:
    recipe = recipe_in(run, **change)
    begin(recipe)
    assert yaml.safe_load((run / "config.yaml").read_text()) == to_mapping(recipe)


@pytest.mark.parametrize("allowed", ["optimizer", "optimizer.learning_rate"])
def test_what_is_named_may_change_and_nothing_else(run: Path, allowed: str) -> None:
    with pytest.raises(CheckpointError, match=r"\(seed: 10 -> 4\)"):
        open_run_directory(recipe_in(run, seed=4, optimizer__learning_rate=0.02), rank=0, allow_change=[allowed])
    begin(recipe_in(run, optimizer__learning_rate=0.02), allowed)
    with pytest.raises(CheckpointError, match=r"learning_rate: 0\.02 -> 0\.01"):
        open_run_directory(recipe_in(run), rank=0)


def test_the_beginning_of_a_key_does_not_allow_it(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"optimizer\.warmup_steps: 2 -> 3"):
        open_run_directory(recipe_in(run, optimizer__warmup_steps=3), rank=0, allow_change=["optimizer.warmup", "opt"])


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "home"
    run.mkdir()
    (run / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError) as caught:
        open_run_directory(recipe_in(run), rank=0)
    assert str(caught.value) == f"{run}: not empty and no run of ours; give another `output`"
    assert content(run) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("text", ["port: 80\n", "- a\n", "", "just text"])
def test_somebody_elses_config_is_not_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml: not a recipe of ours; give another `output`"):
        open_run_directory(recipe_in(tmp_path), rank=0)
    assert content(tmp_path) == {"config.yaml": text.encode()}


@pytest.mark.parametrize("damaged", [b"a: [", b"\xff\xfe\xff", b"a: 2001-99-99", b"[" * 10_000])
def test_an_unreadable_config_is_refused(run: Path, damaged: bytes) -> None:
    (run / "config.yaml").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"config\.yaml: cannot be read"):
        open_run_directory(recipe_in(run), rank=0)


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    assert open_run_directory(recipe_in(tmp_path), rank=0) == tmp_path


def test_a_start_that_took_no_step_does_not_bind_the_mended_recipe(tmp_path: Path) -> None:
    """Wrong settings are found after the directory was made: mending them must not need another directory."""
    run = tmp_path / "run"
    begin(recipe_in(run, data__tokens=4))
    (run / "metrics.jsonl").touch()
    begin(recipe_in(run))
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["tokens"] == 128
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"data\.tokens: 128 -> 4"):
        open_run_directory(recipe_in(run, data__tokens=4), rank=0)


def test_a_start_killed_while_it_wrote_the_recipe_does_not_matter(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml.partial").write_text("name: ti")
    begin(recipe_in(run))
    assert sorted(content(run)) == ["config.yaml", "log.txt"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write the run directory: (Not a directory|File exists)"):
        open_run_directory(recipe_in(tmp_path / "file" / "run"), rank=0)


def test_differences() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": None}, "e": 3}
    new = {"a": 1, "b": {"c": [1, 5], "d": {}}, "f": 4}
    assert list(differences(old, new)) == [("b.c.1", 2, 5), ("b.d", None, {}), ("e", 3, None), ("f", None, 4)]
    assert list(differences(old, old)) == []


def test_results(tmp_path: Path) -> None:
    results = {"demo/mlm": {"loss": 1.5}}
    write_results(tmp_path, results)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert sorted(content(tmp_path)) == ["results.json"]


def test_a_run_of_a_version_without_a_key_goes_on(run: Path) -> None:
    earlier = yaml.safe_load((run / "config.yaml").read_text())
    del earlier["stability"], earlier["optimizer"]["decay_rate"]
    (run / "config.yaml").write_text(yaml.safe_dump(earlier))
    open_run_directory(recipe_in(run), rank=0)
    with pytest.raises(CheckpointError, match=r"\(optimizer\.decay_rate: 0\.\d+ -> 0\.5\)"):
        open_run_directory(recipe_in(run, optimizer__decay_rate=0.5), rank=0)
