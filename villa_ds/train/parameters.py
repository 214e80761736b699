"""The state of training by parameter: one layout for every engine, ZeRO stage and number of ranks.

`rank-00000/state-00000-of-00002.safetensors` holds whole tensors (in float32 where the engine keeps a float32 copy)
under ``weight/<name>``, ``exp_avg/<name>`` and ``exp_avg_sq/<name>``; every rank writes its share of the parameters.
The number of updates is in the files' metadata, and so are the further names of tied parameters, which are stored
once, under their first name.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module, Parameter

from villa_ds.errors import CheckpointError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of every optimizer that the project offers
KINDS = (WEIGHT, *MOMENTS)
PATTERN = "state-*.safetensors"


Writer = Callable[[Path], None]  # writes one rank's files of a checkpoint into a folder


def snapshot_parameters(
    module: Module, get: Callable[[Parameter, str], Tensor], *, updates: int, rank: int, world: int
) -> Writer:
    """Copy this rank's share to the host now; the writer it returns may run later, beside training.

    `get(parameter, kind)` gives the whole tensor; all ranks call it in the same order.
    """
    tensors: dict[str, Tensor] = {}
    for index, (name, parameter) in enumerate(module.named_parameters()):
        for kind in KINDS:
            value = get(parameter, kind)
            if index % world == rank:
                tensors[f"{kind}/{name}"] = value.detach().cpu().clone()
    metadata = {"updates": str(updates), "tied": json.dumps(tied_names(module)), "format": "pt"}
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
    """Reads what `snapshot_parameters` wrote, tensor by tensor, whatever the number of ranks was."""

    def __init__(self, folder: Path) -> None:
        self._files: list[Any] = [safe_open(path, framework="pt") for path in sorted(folder.rglob(PATTERN))]
        if not self._files:
            raise CheckpointError(f"{folder}: holds no {PATTERN}")
        self._owner = {key: file for file in self._files for key in file.keys()}  # noqa: SIM118 (not a mapping)

    @property
    def updates(self) -> int:
        """Optimizer updates done."""
        return int(self._files[0].metadata()["updates"])

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
        tied: dict[str, str] = json.loads(self._files[0].metadata()["tied"])
        return weights | {name: weights[first] for name, first in tied.items()}

    def require_fit(self, parameters: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Raise unless names and shapes are those of the model at hand."""
        expected = dict(parameters)
        for name in sorted({*expected, *self.names}):
            if name not in expected or f"{WEIGHT}/{name}" not in self._owner:
                where = "the checkpoint" if name in expected else "this model"
                raise CheckpointError(f"parameter {name} is not in {where}: the checkpoint is of another model")
            shape = tuple(self._owner[f"{WEIGHT}/{name}"].get_slice(f"{WEIGHT}/{name}").get_shape())
            if shape != tuple(expected[name]):
                raise CheckpointError(
                    f"parameter {name} is {list(shape)} in the checkpoint and {list(expected[name])} in this model"
                )


def load_weights(module: Module, folder: Path) -> ParameterFiles:
    """Give `module` the weights of a checkpoint, which must be exactly its own; returns the checkpoint's files."""
    files = ParameterFiles(folder)
    files.require_fit((name, tuple(value.shape)) for name, value in module.named_parameters())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(files.get(WEIGHT, name))
    return files
