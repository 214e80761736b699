"""float16's loss scale is part of a checkpoint: a resumed run overflows where the undisturbed one does.

With DeepSpeed's own scaler and, its refusal of float16 on CPUs switched off, with whole engines. Nothing of it has run
on a GPU.
"""

import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from tests.dist.distance import relative_distance
from tests.dist.ranks import run_ranks
from tests.fault.jobs import TRIALS
from tests.runs import bits
from villa_ds.errors import NonFiniteError
from villa_ds.train.engine import move_loss_scale, read_loss_scale, set_loss_scale
from villa_ds.train.parameters import KINDS, MOMENTS, WEIGHT, LossScale, ParameterFiles, snapshot_parameters

pytestmark = pytest.mark.dist
STEPS, SAVED = 16, 9


def run(*commands: Sequence[str]) -> list[dict[str, Any]]:
    """What single ranks print, two of them at a time."""
    with ThreadPoolExecutor(2) as pool:
        outputs = pool.map(lambda command: run_ranks(1, "tests/dist/steps_worker.py", *command), commands)
        return [json.loads(output.splitlines()[-1]) for (output,) in outputs]


def scaler_of(**changes: Any) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    settings = {"init_scale": 2**16, "scale_window": 3, "min_scale": 1, "delayed_shift": 2}
    return DynamicLossScaler(**{**settings, "consecutive_hysteresis": False, **changes})


@pytest.mark.parametrize("changes", [{}, {"delayed_shift": 1}, {"consecutive_hysteresis": True}, {"scale_window": 5}])
def test_a_scaler_goes_on_as_if_it_had_not_been_saved(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the files of a checkpoint, at every step of a random history."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler, "dist", SimpleNamespace(get_rank=lambda: 1))  # it asks who is to log
    overflows = (np.random.default_rng(0).random(60) < 0.25).tolist()
    undisturbed, scales = scaler_of(**changes), []
    for overflow in overflows:
        move_loss_scale(undisturbed, overflow)
        scales.append(undisturbed.cur_scale)
    assert len(set(scales)) > 3
    going = scaler_of(**changes)
    for step, overflow in enumerate(overflows):
        folder = tmp_path / str(step)
        folder.mkdir()
        state = read_loss_scale(going)
        snapshot_parameters(nn.Linear(1, 1), lambda p, _: p, updates=step, rank=0, world=1, loss_scale=state)(folder)
        going = scaler_of(**changes)
        stored = ParameterFiles(folder).loss_scale
        assert stored == state
        set_loss_scale(going, stored)
        move_loss_scale(going, overflow)
        assert going.cur_scale == scales[step]


def test_an_overflow_at_the_smallest_scale_is_an_error_of_ours() -> None:
    scaler = scaler_of(init_scale=1, delayed_shift=1)
    with pytest.raises(NonFiniteError, match="the gradient overflows at the smallest loss scale, 1"):
        move_loss_scale(scaler, overflow=True)
    move_loss_scale(scaler, overflow=False)
    assert read_loss_scale(scaler) == LossScale(1.0, 1, 1)


def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path) -> None:
    """Bit for bit at the same stage; at another the same scales, and numbers that differ by rounding."""
    whole, half, same, other = (tmp_path / name for name in ("whole", "half", "same", "other"))
    undisturbed, begun = run(
        ["float16", "deepspeed", "zero2", str(whole), str(STEPS)],
        ["float16", "deepspeed", "zero2", str(half), str(SAVED)],
    )
    resumed = [
        ["float16", "deepspeed", stage, str(out), str(STEPS - SAVED), str(half), str(SAVED)]
        for stage, out in (("zero2", same), ("zero3", other))
    ]
    at_stage_2, at_stage_3 = run(*resumed)
    scales, norms = undisturbed["scales"], undisturbed["norms"]
    grown = [after > before for before, after in itertools.pairwise(scales)]
    assert any(grown[: SAVED - 1])
    assert any(grown[SAVED:])
    assert np.isinf(norms[:SAVED]).any()
    assert scales[SAVED - 1] != 2.0**16  # what a scale that is not restored would begin with
    assert begun["scales"] + at_stage_2["scales"] == begun["scales"] + at_stage_3["scales"] == scales
    assert begun["norms"] + at_stage_2["norms"] == norms
    np.testing.assert_allclose(at_stage_3["norms"], norms[SAVED:], rtol=5e-3)
    found, expected = ParameterFiles(same), ParameterFiles(whole)
    assert found.loss_scale == expected.loss_scale == ParameterFiles(other).loss_scale
    for kind in KINDS:
        assert [name for name in found.names if bits(found.get(kind, name)) != bits(expected.get(kind, name))] == []


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"] if TRIALS else ["zero3"])
def test_the_step_at_which_the_scale_grows_has_its_whole_gradient(stage: str, tmp_path: Path) -> None:
    """DeepSpeed alone would divide it by the new scale."""
    growing, steady = run(
        *([plan, "deepspeed", stage, str(tmp_path / plan), "4"] for plan in ("float16", "float16 steady"))
    )
    assert growing["scales"] == [2.0**16, 2.0**16, 2.0**16, 2.0**17]
    assert steady["scales"] == 4 * [2.0**16]
    assert growing["norms"] == steady["norms"]
    found, expected = (ParameterFiles(tmp_path / plan) for plan in ("float16", "float16 steady"))
    assert [relative_distance(kind, found, expected) for kind in (WEIGHT, *MOMENTS)] == [0.0, 0.0, 0.0]
