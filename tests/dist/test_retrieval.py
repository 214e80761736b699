"""Hard negatives on several ranks: every rank makes the choosing passes too, and the update is that of one process."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from tests.tiny import tiny_module
from villa_ds.train.parameters import MOMENTS, WEIGHT, ParameterFiles

pytestmark = pytest.mark.dist
WORKER = "tests/dist/retrieval_worker.py"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    run_ranks(1, WORKER, "torch", "-", str(folder))
    return folder


@pytest.mark.parametrize("config", ["zero0", "zero1", "zero2", "zero3"])
def test_equals_plain_pytorch(config: str, reference: Path, tmp_path: Path) -> None:
    run_ranks(2, WORKER, "deepspeed", config, str(tmp_path))
    found, expected = ParameterFiles(tmp_path), ParameterFiles(reference)
    initial = dict(tiny_module("retrieval-hard", dtype=torch.float32, dropout=0.1).named_parameters())
    assert found.updates == expected.updates == 2
    for kind in (WEIGHT, *MOMENTS):
        difference = size = 0.0
        for name in expected.names:
            base = initial[name].detach().double() if kind == WEIGHT else 0.0
            left, right = found.get(kind, name).double() - base, expected.get(kind, name).double() - base
            difference, size = difference + float((left - right).square().sum()), size + float(right.square().sum())
        assert (difference / size) ** 0.5 <= 1e-5
