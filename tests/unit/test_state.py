"""What a checkpoint says of its run is checked before anything is made of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from villa_ds.errors import CheckpointError
from villa_ds.train.checkpoint import RUN_STATE
from villa_ds.train.state import read_run_state

State = dict[str, Any]
CASE = {"step": 2, "data": "demo", "shard": "a.tar", "group": None, "offset": None, "key": None, "pairs": 3}


@pytest.fixture
def state() -> State:
    return {
        "step": 4,
        "position": {"step": 4, "sets": {"demo": [0, 7]}},
        "batch_plan": {"lanes": 2, "world": 1},
        "recipe": {"name": "tiny"},
        "data": {"demo": "f" * 64},
        "inputs": {"pieces": ["[PAD]"], "sets": {"demo": {"extractor": "e", "answers": ["yes"]}}},
        "stability": {"a/mlm": [1.5, 2]},
        "quarantine": [{**CASE, "reason": "torn", "lost": 3}],
    }


def read(folder: Path, state: State) -> State:
    (folder / RUN_STATE).write_text(json.dumps(state))
    return read_run_state(folder)


def test_a_sound_state_is_read_as_it_is(tmp_path: Path, state: State) -> None:
    assert read(tmp_path, state) == state
    for key in ("inputs", "stability", "quarantine"):  # of an earlier version
        del state[key]
    assert read(tmp_path, state) == state


@pytest.mark.parametrize(
    ("spoil", "key"),
    [
        (lambda state: state.pop("position"), "position"),
        (lambda state: state.update(data=[]), "data"),
        (lambda state: state.update(inputs=None), "inputs"),
        (lambda state: state["position"].update(step=5), "position.step"),
        (lambda state: state["position"].update(sets={"demo": [0, 7.5]}), "position.sets.demo.1"),
        (lambda state: state["position"].update(sets={"demo": [True, 0]}), "position.sets.demo.0"),
        (lambda state: state["batch_plan"].update(lanes="2"), "batch_plan.lanes"),
        (lambda state: state["inputs"].update(pieces=["a", 1]), "inputs.pieces.1"),
        (lambda state: state["inputs"]["sets"]["demo"].pop("extractor"), "inputs.sets.demo.extractor"),
        (lambda state: state["inputs"].update(sets={}), "inputs.sets"),
        (lambda state: state["stability"].update({"a/mlm": {}}), "stability.a/mlm"),
        (lambda state: state["quarantine"][0].pop("lost"), "quarantine.0.lost"),
        (lambda state: state.update(stability={"x" * 500: 1}), "stability." + "x" * 70),
    ],
)
def test_what_is_not_as_we_write_it_is_named(
    tmp_path: Path, state: State, spoil: Callable[[State], object], key: str
) -> None:
    spoil(state)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, state)
    assert str(caught.value) == (
        f"{tmp_path / RUN_STATE}: {key!r} is missing or not what villa_ds writes there; use another checkpoint"
    )
