"""Files of named tensors, read without running code from them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from villa_ds.errors import WeightsError

TENSOR_SUFFIXES = (".pt", ".pth", ".bin")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name of a .safetensors, .pt, .pth or .bin file, on the CPU. Never runs code from the file."""
    path = Path(path)
    if path.suffix not in (".safetensors", *TENSOR_SUFFIXES):
        raise WeightsError(f"{path}: give a .safetensors, {', '.join(TENSOR_SUFFIXES)} file or a BERT folder")
    try:
        content: Any = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # noqa: BLE001 (a damaged file makes torch raise nearly anything)
        told = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise WeightsError(f"{path}: cannot read the weights: {told[:200]}") from None
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path}: expected a plain mapping of names to tensors; export the state dict alone")
    return dict(content)


def write_weights(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name as .safetensors, or as .pt, which the reference code reads; makes the folder."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt"):
        raise WeightsError(f"{path}: weights are written as .safetensors or .pt, not {path.suffix!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(dict(tensors), path)
        else:
            torch.save(dict(tensors), path)
    except (safetensors.SafetensorError, RuntimeError) as error:  # what they make of an OSError
        raise WeightsError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from None
