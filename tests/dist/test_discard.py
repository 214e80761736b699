"""A step that is thrown away leaves nothing behind: what follows equals plain PyTorch, at every stage."""

from pathlib import Path

import pytest

from tests.dist.distance import relative_distance
from tests.dist.ranks import run_ranks
from tests.fault.jobs import TRIALS
from villa_ds.train.parameters import MOMENTS, WEIGHT, ParameterFiles

pytestmark = pytest.mark.dist
WORKER = "tests/dist/discard_worker.py"
STAGES = ["zero0", "zero1", "zero2", "zero3", "zero3_offload"] if TRIALS else ["zero2", "zero3"]
TOLERANCE = {WEIGHT: 1e-5, **dict.fromkeys(MOMENTS, 1e-6)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    run_ranks(1, WORKER, "torch", "-", str(folder), "kept")
    return folder


@pytest.mark.parametrize("world", [1, 2] if TRIALS else [2])
@pytest.mark.parametrize("stage", STAGES)
def test_the_next_update_is_plain_pytorchs(stage: str, world: int, reference: Path, tmp_path: Path) -> None:
    """Gradients that are finite and that are not; of heads that the next step leaves unused."""
    run_ranks(world, WORKER, "deepspeed", stage, str(tmp_path), "all")
    found, expected = ParameterFiles(tmp_path), ParameterFiles(reference)
    assert found.updates == expected.updates == 3
    for kind, tolerance in TOLERANCE.items():
        assert relative_distance(kind, found, expected) <= tolerance


def test_plain_pytorch_itself(reference: Path, tmp_path: Path) -> None:
    run_ranks(1, WORKER, "torch", "-", str(tmp_path), "all")
    found, expected = ParameterFiles(tmp_path), ParameterFiles(reference)
    assert all(relative_distance(kind, found, expected) == 0.0 for kind in TOLERANCE)
