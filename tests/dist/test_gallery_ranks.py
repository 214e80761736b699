"""Recall among a gallery during training: two ranks find what one finds."""

import json
from pathlib import Path

import pytest

from tests.downstream import make_task_shards
from tests.fault.jobs import ZERO, recipe_file, run_to_end

pytestmark = pytest.mark.dist


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name, seed in (("train", 0), ("held-out", 1)):
        make_task_shards(root / name, "retrieval", groups=9, seed=seed)
    found = []
    for world, engine in ((1, {}), (2, ZERO)):
        changes = {
            "tasks": [{"data": "demo", "objective": "retrieval"}], "validation": {"every": 2, "gallery": 7},
            "data": {"tokens": 300, "rows_multiple": 1}, "engine": engine,
        }  # fmt: skip
        run_to_end(recipe_file(root, tmp_path / f"run{world}", 3, **changes), world=world)
        found.append(json.loads((tmp_path / f"run{world}" / "results.json").read_text())["demo/retrieval"])
        log = (tmp_path / f"run{world}" / "log.txt").read_text(encoding="utf-8")
        assert log.count("image_recall_at_1 ") == 2
        assert not list((tmp_path / f"run{world}").glob("gallery-*"))
    one, two = found
    recalls = [name for name in one if "recall" in name]
    assert len(recalls) == 7
    assert {name: two[name] for name in recalls} == {name: one[name] for name in recalls}
    assert 0 < one["recall_mean"] < 1
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
