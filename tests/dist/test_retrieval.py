"""Hard negatives on several ranks: every rank makes the choosing passes too, and the update is that of one process."""

from pathlib import Path

import pytest
import torch

from tests.dist.distance import relative_distance
from tests.dist.ranks import run_ranks
from tests.tiny import tiny_module
from villa_ds.train.parameters import MOMENTS, WEIGHT, ParameterFiles

pytestmark = pytest.mark.dist
WORKER = ("tests/dist/steps_worker.py", "retrieval")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    run_ranks(1, *WORKER, "torch", "-", str(folder), "2")
    return folder


@pytest.mark.parametrize("config", ["zero0", "zero1", "zero2", "zero3"])
def test_equals_plain_pytorch(config: str, reference: Path, tmp_path: Path) -> None:
    run_ranks(2, *WORKER, "deepspeed", config, str(tmp_path), "2")
    found, expected = ParameterFiles(tmp_path), ParameterFiles(reference)
    initial = dict(tiny_module("retrieval-hard", dtype=torch.float32, dropout=0.1).named_parameters())
    assert found.updates == expected.updates == 2
    assert relative_distance(WEIGHT, found, expected, initial) <= 1e-5
    for kind in MOMENTS:
        assert relative_distance(kind, found, expected) <= 1e-5
