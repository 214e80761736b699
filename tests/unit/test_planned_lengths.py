"""The plan knows how long rows will be: real micro-batches of every objective keep the token budget."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.downstream import make_task_shards
from tests.shards import make_shards
from villa_ds.config import DataConfig
from villa_ds.config_objectives import Nlvr2Config, ObjectivesConfig, RetrievalConfig, VcrConfig
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.loader import EvaluationLoader, Loader
from villa_ds.data.manifest import load_manifest
from villa_ds.data.quarantine import DamagedError
from villa_ds.data.reader import ShardReader
from villa_ds.data.sizes import SPECIAL_TOKENS, sizes_of
from villa_ds.errors import DataError
from villa_ds.objectives.base import Objective, build_objective

FEW = RetrievalConfig(candidates=4, hard_negatives=2)
# case -> (layout of the set, settings, whether the plan is exact: it counts no more than the longest row has)
CASES: dict[str, tuple[str, ObjectivesConfig, bool]] = {
    "vqa": ("vqa", ObjectivesConfig(), True),
    "ve": ("ve", ObjectivesConfig(), True),
    "mlm": ("caption", ObjectivesConfig(), True),
    "itm": ("caption", ObjectivesConfig(), False),
    "mrckl": ("caption", ObjectivesConfig(), True),
    "refexp": ("refexp", ObjectivesConfig(), True),
    "nlvr2": ("nlvr2", ObjectivesConfig(), True),
    "nlvr2 triplet": ("nlvr2", ObjectivesConfig(nlvr2=Nlvr2Config(form="triplet")), True),
    "vcr": ("vcr", ObjectivesConfig(), False),
    "vcr qa": ("vcr", ObjectivesConfig(vcr=VcrConfig(questions="qa")), True),
    "vcr every answer": ("vcr", ObjectivesConfig(vcr=VcrConfig(held_out_rationales="every_answer")), False),
    "mlm story": ("vcr", ObjectivesConfig(text="vcr"), False),
    "mrckl story": ("vcr", ObjectivesConfig(text="vcr"), False),
    "gqa": ("gqa", ObjectivesConfig(), True),
    "retrieval": ("retrieval", ObjectivesConfig(), False),
    "retrieval-hard": ("retrieval", ObjectivesConfig(retrieval=FEW), False),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for layout in {layout for layout, _, _ in CASES.values()}:
        make_task_shards(folder / layout, layout)
    return folder


def batches_of(root: Path, case: str, tokens: int, rows_multiple: int) -> tuple[Objective, list[tuple[int, int]]]:
    """(samples, real padded tokens) of every micro-batch of some steps and of a pass for evaluation."""
    layout, settings, _ = CASES[case]
    manifest = load_manifest(root / layout)
    objective = build_objective(case.split(maxsplit=1)[0], settings, manifest)
    data = DataConfig(tokens=tokens, rows_multiple=rows_multiple, lanes=2, window=16, workers=0)
    plan = BatchPlan(2)
    loader = Loader({"set": manifest}, [("set", objective, 1.0)], data, 3, plan, 0, total_steps=12)
    batches = [batch for step in loader for batch in step.batches]
    batches += [batch for batch, _ in EvaluationLoader(manifest, objective.held_out(), data, plan, 0)]
    return objective, [(len(batch.ids), len(batch) * batch.joint_length) for batch in batches]


@pytest.mark.parametrize("case", CASES)
def test_real_padded_tokens_are_within_the_budget(root: Path, case: str) -> None:
    tokens = 1200 if case.startswith(("vcr", "retrieval-hard")) else 300
    _, sizes = batches_of(root, case, tokens, 1)
    assert max(padded for _, padded in sizes) <= tokens
    assert any(samples > 1 for samples, _ in sizes)


@pytest.mark.parametrize("case", [case for case, (_, _, exact) in CASES.items() if exact])
def test_a_sample_is_planned_as_long_as_it_is(root: Path, case: str) -> None:
    """One sample a micro-batch: what is planned is what is made."""
    layout, settings, _ = CASES[case]
    manifest = load_manifest(root / layout)
    objective = build_objective(case.split(maxsplit=1)[0], settings, manifest)
    data = DataConfig(tokens=100_000, rows_multiple=1, lanes=1, window=1, workers=0)
    loader = Loader({"set": manifest}, [("set", objective, 1.0)], data, 3, BatchPlan(1), 0, total_steps=10)
    for step in loader:
        (batch,), (micro,) = step.batches, step.micro_batches
        sizes = sizes_of(manifest.index, micro.pairs)
        assert objective.planned_tokens(sizes).max() * len(batch.ids) == len(batch) * batch.joint_length


def test_a_text_is_as_long_as_its_answers_make_it(root: Path) -> None:
    objective, _ = batches_of(root, "vcr", 2000, 1)
    manifest = load_manifest(root / "vcr")
    data = DataConfig(tokens=2000, rows_multiple=1, lanes=1, window=8, workers=0, max_text_length=18)
    loader = Loader({"set": manifest}, [("set", objective, 1.0)], data, 3, BatchPlan(1), 0, total_steps=20)
    left_out = loader._plans["set"].left_out
    assert 0 < left_out < manifest.num_pairs
    assert max(int(batch.text_lengths.max()) for step in loader for batch in step.batches) <= 18 + SPECIAL_TOKENS


def test_a_set_without_the_lengths_is_refused(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "set", groups=4)
    assert sorted(manifest.index_files) == sorted(manifest.index)
    objective = build_objective("vcr", ObjectivesConfig(), manifest)
    with pytest.raises(DataError, match="does not tell how long answers and rationales are"):
        EvaluationLoader(manifest, objective, DataConfig(workers=0), BatchPlan(1), 0)


@pytest.mark.parametrize(
    ("name", "told"), [("pair_answer", "choices"), ("pair_rationale", "choices"), ("group_largest", "largest")]
)
def test_a_group_that_is_longer_than_planned_is_damaged(root: Path, tmp_path: Path, name: str, told: str) -> None:
    """Batches would be larger than their budget, and texts longer than the model has positions for."""
    folder = shutil.copytree(root / "vcr", tmp_path / "set")
    lengths = np.load(folder / f"{name}.npy")
    lengths[0] = 1
    np.save(folder / f"{name}.npy", lengths)
    reader = ShardReader(load_manifest(folder))
    with pytest.raises(
        DamagedError, match=rf"group 0 at byte 0 \(g000\) has .*{told}.*, {name}\.npy says .*1"
    ) as caught:
        reader.sample(0)
    assert caught.value.damage.pairs == int((reader.manifest.index["pair_group"] == 0).sum())
    assert reader.sample(reader.manifest.num_pairs - 1).id


def test_too_few_images_to_rank_against(root: Path) -> None:
    manifest = load_manifest(root / "retrieval")
    objective = build_objective(
        "retrieval-hard", ObjectivesConfig(retrieval=RetrievalConfig(candidates=12, hard_negatives=2)), manifest
    )
    with pytest.raises(DataError, match=r"12 candidates .* are wanted, but there are 11 other images"):
        Loader({"set": manifest}, [("set", objective, 1.0)], DataConfig(workers=0), 3, BatchPlan(4), 0, total_steps=1)
