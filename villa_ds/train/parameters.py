"""The state of training by parameter: one layout for every engine, ZeRO stage and number of ranks.

`rank-00000/state-00000-of-00002.safetensors` holds whole tensors (in float32 where the engine keeps a float32 copy)
under ``weight/<name>``, ``exp_avg/<name>`` and ``exp_avg_sq/<name>``; every rank writes its share of the parameters.
The number of updates is in the files' metadata, and so are the further names of tied parameters, which are stored
once, under their first name, and in float16 the state of the loss scale.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module, Parameter

from villa_ds.errors import CheckpointError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of every optimizer that the project offers
KINDS = (WEIGHT, *MOMENTS)
PATTERN = "state-*.safetensors"
_NAME = re.compile(r"state-(\d{5,})-of-(\d{5,})\.safetensors")

Writer = Callable[[Path], None]  # writes one rank's files of a checkpoint into a folder


@dataclass(frozen=True)
class LossScale:
    """Where a dynamic loss scale of float16 stands: it decides which steps overflow, so it is part of the run."""

    scale: float
    calm: int  # steps since the last overflow; at certain numbers of them the scale grows
    patience: int  # overflows that are borne, this one included, before the scale shrinks

    def __post_init__(self) -> None:
        counts = type(self.calm) is int and type(self.patience) is int and self.calm >= 0 and self.patience >= 1
        if not counts or type(self.scale) is not float or not 0 < self.scale < math.inf:
            raise ValueError(f"no state of a loss scale: {self}")


def snapshot_parameters(
    module: Module,
    get: Callable[[Parameter, str], Tensor],
    *,
    updates: int,
    rank: int,
    world: int,
    loss_scale: LossScale | None = None,
) -> Writer:
    """Copy this rank's share to the host now; the writer it returns may run later, beside training.

    `get(parameter, kind)` gives the whole tensor; all ranks call it in the same order. `loss_scale` is the same on all.
    """
    tensors: dict[str, Tensor] = {}
    for index, (name, parameter) in enumerate(module.named_parameters()):
        for kind in KINDS:
            value = get(parameter, kind)
            if index % world == rank:
                tensors[f"{kind}/{name}"] = value.detach().cpu().clone()
    metadata = {"updates": str(updates), "tied": json.dumps(tied_names(module)), "format": "pt"}
    if loss_scale is not None:
        metadata["loss_scale"] = json.dumps(asdict(loss_scale))
    return lambda folder: save_file(tensors, folder / f"state-{rank:05d}-of-{world:05d}.safetensors", metadata=metadata)


def tied_names(module: Module) -> dict[str, str]:
    """Further name of a tied parameter -> its first name."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            tied[name] = owner
    return tied


class ParameterFiles:
    """Reads what `snapshot_parameters` wrote, tensor by tensor, whatever the number of ranks was.

    `updates` is the number of optimizer updates done, `loss_scale` None where it was not written in float16.
    CheckpointError unless the folder holds the files of all ranks of one snapshot, each tensor once and of every kind.
    """

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.rglob(PATTERN))
        if not paths:
            raise CheckpointError(f"{folder}: holds no {PATTERN}")
        _require_all_ranks(folder, paths)
        self._owner: dict[str, Any] = {}
        metadata: dict[str, str] | None = None
        for path in paths:
            try:
                file: Any = safe_open(path, framework="pt")
                told = file.metadata()
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}; use an earlier checkpoint") from None
            if metadata is not None and told != metadata:
                raise CheckpointError(f"{path}: of another checkpoint than {paths[0]}; use an earlier checkpoint")
            metadata = told
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                if key in self._owner:
                    raise CheckpointError(f"{folder}: holds {_shown(key)} twice; use an earlier checkpoint")
                self._owner[key] = file
        self._require_kinds(folder)
        self.updates, self._tied, self.loss_scale = _parse_metadata(paths[0], metadata or {}, set(self.names))

    def _require_kinds(self, folder: Path) -> None:
        for key, file in self._owner.items():
            kind, _, name = key.partition("/")
            described = file.get_slice(key)
            fit = kind in KINDS and all(f"{each}/{name}" in self._owner for each in KINDS)
            if fit and kind != WEIGHT:
                weight = f"{WEIGHT}/{name}"
                fit = described.get_shape() == self._owner[weight].get_slice(weight).get_shape()
            if not fit or not described.get_dtype().startswith(("F", "BF")):
                raise CheckpointError(
                    f"{folder}: {_shown(key)} is no weight with its moments; the files were not written by villa_ds: "
                    "use an earlier checkpoint"
                )

    @property
    def names(self) -> list[str]:
        """Parameter names."""
        return [key.removeprefix(f"{WEIGHT}/") for key in self._owner if key.startswith(f"{WEIGHT}/")]

    def get(self, kind: str, name: str) -> Tensor:
        """One whole tensor, on the CPU."""
        tensor: Tensor = self._owner[f"{kind}/{name}"].get_tensor(f"{kind}/{name}")
        return tensor

    def state_dict(self) -> dict[str, Tensor]:
        """All weights by name, tied ones under every name."""
        weights = {name: self.get(WEIGHT, name) for name in self.names}
        return weights | {name: weights[first] for name, first in self._tied.items()}

    def require_fit(self, parameters: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Raise unless names and shapes are those of the model at hand."""
        expected = dict(parameters)
        for name in sorted({*expected, *self.names}):
            if name not in expected or f"{WEIGHT}/{name}" not in self._owner:
                where = "the checkpoint" if name in expected else "this model"
                raise CheckpointError(f"parameter {_shown(name)} is not in {where}: the checkpoint is of another model")
            shape = tuple(self._owner[f"{WEIGHT}/{name}"].get_slice(f"{WEIGHT}/{name}").get_shape())
            if shape != tuple(expected[name]):
                raise CheckpointError(
                    f"parameter {name} is {list(shape)} in the checkpoint and {list(expected[name])} in this model"
                )


def _require_all_ranks(folder: Path, paths: Iterable[Path]) -> None:
    named = [_NAME.fullmatch(path.name) for path in paths]
    found = sorted((int(name[1]), int(name[2])) for name in named if name is not None)
    if len(found) < len(named) or found != [(rank, len(named)) for rank in range(len(named))]:
        names = ", ".join(sorted(path.name for path in paths)[:4])
        raise CheckpointError(
            f"{folder}: the files of the ranks do not belong together or are not all there ({names}); copy the whole "
            "checkpoint again, or use an earlier one"
        )


def _parse_metadata(
    path: Path, metadata: dict[str, str], names: set[str]
) -> tuple[int, dict[str, str], LossScale | None]:
    """(number of updates, further name of a tied parameter -> its first name, where the loss scale stands)."""
    try:
        updates, tied = int(metadata["updates"]), json.loads(metadata["tied"])
        scale = LossScale(**json.loads(metadata["loss_scale"])) if "loss_scale" in metadata else None
        if updates >= 0 and isinstance(tied, dict) and not names & tied.keys() and set(tied.values()) <= names:
            return updates, tied, scale
    except (KeyError, TypeError, ValueError, RecursionError):
        pass
    raise CheckpointError(f"{path}: its metadata is not that of a checkpoint of villa_ds; use an earlier checkpoint")


def _shown(name: str) -> str:
    """A name for a message: what a damaged file calls a tensor has no bound."""
    return name if len(name) <= 80 and name.isprintable() else f"{name[:77]!r}..."


def load_weights(module: Module, folder: Path) -> ParameterFiles:
    """Give `module` the weights of a checkpoint, which must be exactly its own; returns the checkpoint's files."""
    files = ParameterFiles(folder)
    files.require_fit((name, tuple(value.shape)) for name, value in module.named_parameters())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(files.get(WEIGHT, name))
    return files
