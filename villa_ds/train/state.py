"""What a checkpoint says of its run besides tensors, read and checked: `run.json`."""

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from villa_ds.errors import CheckpointError
from villa_ds.train.checkpoint import RUN_STATE, read_state

ANY = "*"  # any key of a mapping
SHAPE = {
    "step": int,
    "position": {"step": int, "sets": {ANY: [int]}},
    "batch_plan": {ANY: int},
    "recipe": {},
    "data": {ANY: str},
    "inputs": {"pieces": [str], "sets": {ANY: {"extractor": str, "answers": [str]}}},
    "stability": {ANY: [float]},
    "quarantine": [
        {
            "step": int, "data": str, "shard": str, "group": (int, NoneType), "offset": (int, NoneType),
            "key": (str, NoneType), "pairs": int, "reason": str, "lost": int,
        }
    ],
}  # fmt: skip
LATER = {"inputs", "stability", "quarantine"}  # what checkpoints of the first versions do not say


def read_run_state(folder: Path) -> dict[str, Any]:
    """The run state of a verified checkpoint: all of `SHAPE`, but for what is in `LATER`.

    CheckpointError names the key that is missing or of another type, or contradicts another.
    """
    state = read_state(folder)
    there = [key for key in SHAPE if key in state or key not in LATER]
    wrong = next((wrong for key in there if (wrong := _misfit(state.get(key), SHAPE[key], key)) is not None), None)
    if wrong is None and state["position"]["step"] != state["step"]:
        wrong = "position.step"
    if wrong is None and "inputs" in state and state["inputs"]["sets"].keys() != state["data"].keys():
        wrong = "inputs.sets"
    if wrong is not None:
        raise CheckpointError(
            f"{folder / RUN_STATE}: {wrong[:80]!r} is missing or not what villa_ds writes there; use another checkpoint"
        )
    return state


def require_inputs(place: Path, state: Mapping[str, Any]) -> None:
    """CheckpointError for a checkpoint of before they told of vocabulary, answers and extractor."""
    if "inputs" not in state:
        raise CheckpointError(
            f"{place}: saved by an earlier version, it does not tell its vocabulary and extractor: let the run take "
            "another step with this version (raise a phase's steps, --allow-change phases), or use `villa-ds evaluate`"
        )


def _misfit(value: Any, shape: Any, key: str) -> str | None:
    """Dotted key of the first place that is not of the shape; None if all are."""
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return key
        parts = [(name, item, shape[ANY]) for name, item in value.items()] if ANY in shape else []
        parts += [(name, value.get(name), part) for name, part in shape.items() if name != ANY]
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return key
        parts = [(str(place), item, shape[0]) for place, item in enumerate(value)]
    else:
        kinds = {float: (float, int)}.get(shape, shape if isinstance(shape, tuple) else (shape,))
        return None if type(value) in kinds else key
    found = (_misfit(item, part, f"{key}.{name}") for name, item, part in parts)
    return next((wrong for wrong in found if wrong is not None), None)
